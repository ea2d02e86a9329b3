"""cascade's own API: jobs, their events, the gallery; and requests that wait for a job.

`/openapi.json` describes it.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response, UploadFile
from fastapi import Path as FromPath
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field

from cascade.batch.metadata import read_metadata
from cascade.config.stage import StageConfig
from cascade.drawing.arguments import common_step
from cascade.pipeline import CascadePipeline
from cascade.server.again import asked_of
from cascade.server.asked import MOST_PIXELS, Asked, AskedMatrix
from cascade.server.jobs import Event, Job, State
from cascade.server.models import Models, model_card
from cascade.server.queue import BusyError, Queue
from cascade.server.runs import Runs
from cascade.server.sources import as_sent, checked_size
from cascade.settings import Settings

KEEP_ALIVE_SECONDS = 15.0
_FOREVER = "private, max-age=31536000, immutable"  # a picture's name is derived from its content
_TYPES = {"png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}


class Star(Settings):
    """Whether a picture is starred."""

    starred: bool


def client_of(request: Request) -> str:
    """The client of a request, for fair scheduling: the name that a tab sends, else the address."""
    return request.headers.get("x-cascade-client", request.client.host if request.client else "")[:64]


class Chosen(Settings):
    """The choice of a model by name."""

    name: Annotated[str, Field(max_length=255)]


def model_router(queue: Queue, models: Models) -> APIRouter:
    """Routes of the current model and the choice of another."""
    router = APIRouter(prefix="/api", tags=["model"])

    @router.get("/model")
    def model() -> dict[str, Any]:
        """The model and its settings; waits while it is loading."""
        return model_card(queue.pipeline, models.card(), queue.adapters)

    @router.get("/models")
    def every() -> dict[str, Any]:
        """Names of the available models, the current one first."""
        return {"models": models.names()}

    @router.put("/model", status_code=202)
    def choose(chosen: Chosen) -> dict[str, Any]:
        """Switch to another model; status 409 while jobs are waiting or being drawn."""
        switch(queue, models, chosen.name)
        return {"models": models.names()}

    return router


def switch(queue: Queue, models: Models, name: str) -> None:
    """Switch to another model. Raises CascadeError for an unknown name, BusyError while pictures are drawn."""
    with models.lock:
        before = models.current
        load = models.choose(name)
        try:
            queue.switch(load)
        except BusyError:
            models.choose(before)
            raise


def jobs_router(queue: Queue) -> APIRouter:
    """Routes that submit, watch and stop jobs."""
    router = APIRouter(prefix="/api", tags=["jobs"])

    @router.post("/jobs", status_code=202)
    def ask(asked: Asked, request: Request) -> dict[str, Any]:
        """Submit a job."""
        return queue.submit(asked, client_of(request)).to_json()

    @router.post("/matrix", status_code=202)
    def matrix(asked: AskedMatrix, request: Request) -> dict[str, Any]:
        """Submit a job for each cell of a sheet, row by row; all or none."""
        axes = asked.read()
        jobs = queue.submit_all(asked.cells(), client_of(request))
        rows = () if axes.rows is None else range(len(axes.rows.values))
        return {
            "columns": [axes.columns.label(place) for place in range(len(axes.columns.values))],
            "rows": [axes.rows.label(place) for place in rows] if axes.rows is not None else [],
            "jobs": [job.to_json() for job in jobs],
        }

    @router.get("/jobs")
    def jobs() -> dict[str, Any]:
        """Waiting, current and recent jobs."""
        return {"jobs": [job.to_json() for job in queue.jobs()]}

    @router.get("/jobs/{id}")
    def job(id: str) -> dict[str, Any]:
        """One job."""
        with found("job"):
            return queue.job(id).to_json()

    @router.delete("/jobs/{id}")
    def stop(id: str) -> dict[str, Any]:
        """Stop a job; its unfinished pictures are kept."""
        with found("job"):
            job = queue.job(id)
        queue.stop(job)
        return job.to_json()

    @router.get("/events")
    async def events() -> StreamingResponse:
        """Server-sent events: `state` first, then `step`, `picture`, `job` and `model` as they occur."""
        return StreamingResponse(news(queue), media_type="text/event-stream", headers={"cache-control": "no-store"})

    return router


async def news(queue: Queue) -> AsyncIterator[str]:
    """The stream of `/api/events`."""
    with queue.hub.watching() as watcher:
        yield _event("state", state_of(queue))
        while not watcher.closed:
            events = await watcher.next(KEEP_ALIVE_SECONDS)
            if watcher.missed:
                watcher.missed = False
                yield _event("state", state_of(queue))
            for event in events:
                yield _event(event.kind, event.data)
            if not events:
                yield ": still here\n\n"


def state_of(queue: Queue) -> dict[str, Any]:
    """The complete state for a new watcher."""
    loaded = queue.worker.pipeline
    error = loaded.exception() if loaded.done() else None
    return {
        "ready": loaded.done() and error is None,
        "error": "" if error is None else str(error),
        "jobs": [job.to_json() for job in queue.jobs()],
    }


def gallery_router(queue: Queue) -> APIRouter:
    """Routes of the gallery."""
    router, gallery = APIRouter(prefix="/api", tags=["gallery"]), queue.gallery

    @router.get("/pictures")
    def pictures(
        search: Annotated[str, Query(max_length=500)] = "",
        starred: bool = False,
        before: Annotated[str | None, Query(max_length=16)] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
    ) -> dict[str, Any]:
        """Pictures, newest first; `before`: only older ones than this picture."""
        return gallery.page(search, starred, before, limit)

    @router.get("/pictures/{id}")
    def picture(id: str) -> dict[str, Any]:
        """A picture's entry in the gallery."""
        with found("picture"):
            return gallery.get(id)

    @router.get("/pictures/{id}/asked")
    def asked(id: str) -> dict[str, Any]:
        """The request that draws this picture again."""
        with found("picture"):
            return _asked_again(gallery.said(id), queue)

    @router.put("/pictures/{id}/star")
    def star(id: str, star: Star) -> dict[str, Any]:
        """Star or unstar a picture."""
        with found("picture"):
            return gallery.star(id, star.starred)

    @router.delete("/pictures/{id}", status_code=204)
    def delete(id: str) -> None:
        """Delete a picture; `restore` can bring it back until the server ends."""
        with found("picture"):
            gallery.delete(id)

    @router.post("/pictures/{id}/restore")
    def restore(id: str) -> dict[str, Any]:
        """Restore a deleted picture."""
        with found("picture"):
            return gallery.restore(id)

    return router


def runs_router(runs: Runs) -> APIRouter:
    """Routes of the training runs in a folder."""
    router = APIRouter(prefix="/api", tags=["training"])

    @router.get("/runs")
    def every() -> dict[str, Any]:
        """Progress of each run, the run with the newest entry first."""
        return {"folder": runs.folder.name, "runs": runs.every()}

    @router.get("/runs/{id}")
    def run(id: str) -> dict[str, Any]:
        """A run with its curves, warnings and the steps of its sample grids."""
        with found("run"):
            return runs.get(id)

    @router.get("/runs/{id}/grids/{step}")
    def grid(id: str, step: Annotated[int, FromPath(ge=0, lt=1 << 53)]) -> Response:
        """A grid of sample pictures."""
        with found("grid"):
            return Response(runs.grid(id, step), media_type="image/png", headers={"cache-control": "no-cache"})

    return router


def files_router(queue: Queue) -> APIRouter:
    """Routes that send and receive picture files."""
    router, gallery = APIRouter(prefix="/api", tags=["gallery"]), queue.gallery

    @router.get("/pictures/{id}/file")
    def file(id: str, download: bool = False) -> Response:
        """The picture file, with its recipe in the metadata."""
        with found("picture"):
            name, content = gallery.read(id)
        kind = "attachment" if download else "inline"
        headers = {"cache-control": _FOREVER, "content-disposition": f'{kind}; filename="{_plain(name)}"'}
        return Response(content, media_type=_TYPES.get(name.rpartition(".")[2], "image/png"), headers=headers)

    @router.get("/pictures/{id}/thumbnail")
    def thumbnail(id: str) -> Response:
        """A small WebP of the picture."""
        with found("picture"):
            return Response(gallery.thumbnail(id), media_type="image/webp", headers={"cache-control": _FOREVER})

    @router.get("/traces/{name}")
    def trace(name: str) -> dict[str, Any]:
        """The values of every stage and step of a job with `trace`: the trace.json of `cascade trace`."""
        with found("trace"):
            return gallery.traces.get(name)

    @router.get("/traces/{name}/{file}")
    def trace_file(name: str, file: str) -> Response:
        """A picture that the trace names, `sheet.png` or `trace.webp`."""
        with found("trace"):
            content = gallery.traces.file(name, file)
        kind = _TYPES[file.rpartition(".")[2]]
        return Response(content, media_type=kind, headers={"cache-control": _FOREVER})

    @router.post("/uploads", status_code=201)
    async def upload(picture: UploadFile) -> dict[str, Any]:
        """Store a picture or a mask for editing; `name` is the value for `image` or `mask` of a job."""
        content = await picture.read()
        return await run_in_threadpool(queue.sources.take, content)

    @router.get("/uploads/{name}")
    def uploaded(name: str) -> Response:
        """An upload, or a picture of the gallery, by the name used in a job."""
        content = queue.sources.content(name)
        return Response(content, media_type="image/png", headers={"cache-control": _FOREVER})

    @router.post("/read")
    async def read(picture: UploadFile) -> dict[str, Any]:
        """The request stored in the metadata of a picture drawn by cascade."""
        content = await picture.read()
        return await run_in_threadpool(_asked_in, content, queue)

    return router


def _asked_in(content: bytes, queue: Queue) -> dict[str, Any]:
    checked_size(content)
    said, _ = read_metadata(io.BytesIO(content))
    return _asked_again(said, queue)


def _asked_again(said: Mapping[str, Any], queue: Queue) -> dict[str, Any]:
    """The request for a picture with these metadata; see `asked_of`. Adapters that are not here are left out."""
    asked, adapters = asked_of(said, _stages(queue), queue.pipeline.styles), queue.adapters
    named = {} if adapters is None else adapters.named(said.get("adapters") or {})
    return {**asked, "adapters": named} if named else asked


def _stages(queue: Queue) -> list[StageConfig]:
    pipeline = queue.pipeline
    return [slot.config for slot in (*pipeline.enlargers, *pipeline.slots)]


@contextmanager
def found(kind: str) -> Iterator[None]:
    """Turn a KeyError into status 404."""
    try:
        yield
    except KeyError:
        raise HTTPException(404, f"no such {kind}") from None


def _plain(name: str) -> str:
    """A file name that is valid in a header."""
    return "".join(letter for letter in name if (letter.isalnum() and letter.isascii()) or letter in "-._")


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


# --- requests that wait ----------------------------------------------------------------------------------------------
# Synchronous requests: from a requested size to a job, and from a finished job to a response.

_LOOK_SECONDS = 0.5


def drawn_size(pipeline: CascadePipeline, height: int, width: int) -> dict[str, int]:
    """`until`, `height` and `width` to draw, so that averaging down gives the requested size.

    The smallest stage that is large enough draws it, since a later stage would have to draw smaller than it was trained
    for.
    """
    configs = [slot.config for slot in pipeline.slots]
    for place, config in enumerate(configs):
        scale, step = config.resolution / min(height, width), common_step(configs[: place + 1])
        sides = height * scale, width * scale
        if scale >= 1 and not any(side % step for side in sides) and sides[0] * sides[1] <= MOST_PIXELS:
            return {"until": config.resolution, "height": round(sides[0]), "width": round(sides[1])}
    return {"height": height, "width": width}  # the pipeline raises the error


async def submitted(queue: Queue, asked: Asked, request: Request) -> Job:
    """Submit a job to the queue. Raises CascadeError, FullError."""
    return await run_in_threadpool(queue.submit, asked, client_of(request))


async def watched(queue: Queue, job: Job, request: Request) -> AsyncIterator[Event]:
    """The events of a job until it ends; the job is stopped when the client disconnects."""
    with queue.hub.watching() as watcher:
        while not job.result.done() and not watcher.closed:
            if await request.is_disconnected():
                break
            for event in await watcher.next(_LOOK_SECONDS):
                if event.data.get("job") == job.id:
                    yield event
    if not job.result.done():
        queue.stop(job)


async def finished(queue: Queue, job: Job, request: Request) -> None:
    """Wait for a job. Raises HTTPException when it fails, or another client stops it."""
    while not job.result.done():
        await asyncio.wait({asyncio.wrap_future(job.result)}, timeout=_LOOK_SECONDS)
        if not queue.worker.alive:
            raise HTTPException(503, "the server is shutting down; it will draw unfinished jobs when it starts again")
        if await request.is_disconnected():
            queue.stop(job)
            raise HTTPException(499, "the client disconnected")
    check(job)


def check(job: Job) -> None:
    """Raise HTTPException for a job without finished pictures."""
    if job.state is State.FAILED:
        raise HTTPException(500, job.error)
    if job.state is not State.DONE:
        raise HTTPException(409, "another client stopped the job")


def pictures_of(queue: Queue, job: Job, size: tuple[int, int] | None, format: str) -> list[bytes]:
    """The files of a finished job; see `as_sent`."""
    ids = [str(picture["id"]) for _, picture in sorted(job.pictures.items())]
    return [as_sent(queue.gallery.read(id)[1], queue.gallery.said(id), size, format) for id in ids]
