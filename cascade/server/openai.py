"""OpenAI's images API, compatible with its client: generations, edits and variations, and the list of models.

Source: https://platform.openai.com/docs/api-reference/images. cascade's settings are passed through `extra_body`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from cascade.batch.metadata import read_metadata
from cascade.config.values import SETTINGS
from cascade.errors import CascadeError, quoted
from cascade.files.text import parse_json
from cascade.pipeline import CascadePipeline
from cascade.server.api import check, client_of, drawn_size, finished, pictures_of, switch, watched
from cascade.server.asked import MOST_PICTURES, Asked
from cascade.server.jobs import Job
from cascade.server.models import Models
from cascade.server.queue import BusyError, Queue
from cascade.server.sources import transparency
from cascade.settings import parse

_PRESETS = {"low": "fast", "medium": "default", "standard": "default", "high": "best", "hd": "best", "auto": None}
_OF_A_CHANGE = ("strength", "extend", "resampling", "variation")
_OURS = ("seed", "negative_prompt", "conditions", "adapters", *SETTINGS, *_OF_A_CHANGE)

_MOST_FILES, _MOST_FIELDS = 17, 64
_MODEL_SECONDS, _LOOK_SECONDS = 60.0, 0.2  # that a request for another model waits for the pictures of the current one


class Generation(BaseModel):
    """The body of `/v1/images/generations`, and the fields of the other two forms. Other fields are ignored."""

    model_config = ConfigDict(extra="allow")

    prompt: str
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MOST_PICTURES)
    size: str | None = None
    quality: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=3)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width; None: the model's default. Raises CascadeError."""
        if self.size in (None, "auto"):
            return None
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(self.size))
        if match is None or not int(match[1]) * int(match[2]):
            raise CascadeError(f"size: {quoted(self.size)}; expected WIDTHxHEIGHT, such as 1024x1024, or auto")
        return int(match[2]), int(match[1])

    def asked(self, pipeline: CascadePipeline, given: Mapping[str, str] | None = None) -> Asked:
        """The request as a job. given: the names of a picture and a mask. Raises CascadeError."""
        if self.quality not in (None, *_PRESETS):
            raise CascadeError(f"quality: {quoted(self.quality)}; expected {', '.join(_PRESETS)}")
        preset = _PRESETS.get(self.quality or "auto")
        known = any(preset in slot.config.presets for slot in pipeline.slots)
        ours = {name: value for name, value in (self.model_extra or {}).items() if name in _OURS}
        values = {
            "prompt": self.prompt,
            "num_images_per_prompt": self.n,
            "preset": preset if known else None,
            **({} if self.sides is None else drawn_size(pipeline, *self.sides)),
            **ours,
            **(given or {}),
        }
        if {"mask", "extend"} & values.keys():  # the result has the picture's own size
            values = {name: value for name, value in values.items() if name not in ("until", "height", "width")}
        return parse(Asked, values, "request")


def openai_router(queue: Queue, models: Models | None = None, *, keeps: bool = True) -> APIRouter:
    """`/v1`. models: those that a request may name; None: the loaded one alone.

    keeps: later requests reach the same pictures, so a response may hold URLs.
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    desk = _Desk(queue, models)

    @router.get("/models")
    def every() -> dict[str, Any]:
        """The models that a request may name, the loaded one first."""
        return {"object": "list", "data": [_model(id) for id in desk.ids()]}

    @router.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """A model by its id."""
        desk.place(name)
        return _model(name)

    @router.post("/images/generations", response_model=None)
    async def generations(body: Generation, request: Request) -> Response:
        """Draw pictures; the response is the pictures, or a stream with partial ones."""
        _check_format(body, keeps)
        return await _drawn(desk, body, None, request)

    @router.post("/images/edits", response_model=None)
    async def edits(request: Request) -> Response:
        """Edit a picture; the transparent part of the mask is redrawn."""
        return await _changed(desk, request, keeps, variation=False)

    @router.post("/images/variations", response_model=None)
    async def variations(request: Request) -> Response:
        """Draw variations of a picture."""
        return await _changed(desk, request, keeps, variation=True)

    return router


@dataclass(frozen=True)
class _Desk:
    """The queue, and the models among which a request chooses by its field `model`."""

    queue: Queue
    models: Models | None

    def ids(self) -> dict[str, str]:
        """Names of models by id, the current one first."""
        if self.models is None:
            return {self.queue.pipeline.name: ""}
        return self.models.ids(_pipeline_of(self.queue.worker.pipeline))

    def place(self, id: str) -> str:
        """The name of a model, by its id or by this name. Raises HTTPException for an unknown model."""
        ids = self.ids()
        own = _pipeline_of(self.queue.worker.pipeline)
        if own is not None and id == own.name:
            return next(iter(ids.values()))
        if id not in ids and id not in ids.values():
            known = ", ".join(map(quoted, ids))
            raise HTTPException(404, f"model {quoted(id)} is not available; this server has {known}")
        return ids.get(id, id)

    def submit(self, body: Generation, given: Mapping[str, str] | None, client: str) -> Job:
        """Add a request to the queue; another model than the current one is loaded first.

        Raises BusyError while pictures of the current one are drawn, and as `Queue.submit`.
        """
        loaded = self._loaded(body.model)
        return self.queue.submit(body.asked(loaded.result(), given), client, loaded)

    def _loaded(self, id: str | None) -> Future[CascadePipeline]:
        if id is None:
            return self.queue.worker.pipeline
        place = self.place(id)
        if self.models is None:
            return self.queue.worker.pipeline
        with self.models.lock:
            if place != self.models.current:
                switch(self.queue, self.models, place)
            return self.queue.worker.pipeline


def _pipeline_of(loaded: Future[CascadePipeline]) -> CascadePipeline | None:
    """A model once it is loaded; None if that failed."""
    return loaded.result() if loaded.exception() is None else None


async def _submitted(desk: _Desk, body: Generation, given: Mapping[str, str] | None, request: Request) -> Job:
    """Add a request to the queue; with another model, once the pictures of the current one are drawn."""
    until = time.monotonic() + _MODEL_SECONDS
    while True:
        try:
            return await run_in_threadpool(desk.submit, body, given, client_of(request))
        except BusyError:
            if time.monotonic() > until:
                raise
        if await request.is_disconnected():
            raise HTTPException(499, "the client disconnected")
        await asyncio.sleep(_LOOK_SECONDS)


async def _drawn(desk: _Desk, body: Generation, given: Mapping[str, str] | None, request: Request) -> Response:
    """The pictures of a job, or a stream with partial ones. given: see `Generation.asked`."""
    queue, job = desk.queue, await _submitted(desk, body, given, request)
    if body.stream:
        return StreamingResponse(_stream(queue, body, job, request), media_type="text/event-stream")
    await finished(queue, job, request)
    files = await run_in_threadpool(pictures_of, queue, job, body.sides, body.output_format)
    as_urls = body.response_format == "url" and body.sides in (None, job.size)
    data = [_datum(file, picture["id"] if as_urls else None, request) for file, picture in _pairs(job, files)]
    return JSONResponse({"created": int(time.time()), **_said(body, job), "data": data})


async def _changed(desk: _Desk, request: Request, keeps: bool, *, variation: bool) -> Response:
    """Read a form with a picture, and optionally a mask and a prompt; draw."""
    async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS) as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        files = [(name, await value.read()) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    body = _body_of(fields, variation)
    _check_format(body, keeps)
    pictures = [content for name, content in files if name in ("image", "image[]")]
    mask = next((content for name, content in files if name == "mask"), None)
    if len(pictures) != 1:
        raise CascadeError(f"image: {len(pictures)} pictures; expected one")
    given = await run_in_threadpool(_sources_of, desk.queue, pictures[0], None if variation else mask)
    if variation:
        body.prompt = await run_in_threadpool(_prompt_in, pictures[0])
    return await _drawn(desk, body, given, request)


def _body_of(fields: Mapping[str, str], variation: bool) -> Generation:
    """The request in the text fields of a form. Raises CascadeError."""
    values = {name: _unquoted(value) if name in _OURS else value for name, value in fields.items()}
    try:
        return Generation.model_validate({"prompt": "", **values} if variation else values)
    except ValidationError as error:
        told = [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
        raise CascadeError("; ".join(told)) from None


def _unquoted(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _sources_of(queue: Queue, picture: bytes, mask: bytes | None) -> dict[str, str]:
    """The names of a picture and its mask: the transparent part of the mask, or of the picture if there is none."""
    given = {"image": str(queue.sources.take(picture)["name"])}
    alpha = transparency(picture if mask is None else mask)
    if alpha is not None and alpha.any():
        given["mask"] = queue.sources.take_mask(alpha)
    elif mask is not None:
        given["mask"] = str(queue.sources.take(mask)["name"])
    return given


def _prompt_in(picture: bytes) -> str:
    """The prompt in the metadata of a picture drawn by cascade; "" for any other."""
    try:
        return str(read_metadata(io.BytesIO(picture))[0]["prompt"])
    except CascadeError:
        return ""


async def _stream(queue: Queue, body: Generation, job: Job, request: Request) -> AsyncIterator[str]:
    """Partial pictures at equal intervals, each x_hat of the base stage, then the finished one."""
    kind = "image_generation" if job.asked.image is None else "image_edit"
    sent: dict[int, int] = {}
    async for event in watched(queue, job, request):
        number = int(event.data.get("number", 0))
        index = sent.get(number, 0)
        due = event.kind == "step" and event.data["fraction"] >= (index + 1) / (body.partial_images + 1)
        if due and index < body.partial_images and event.data["preview"]:
            sent[number] = index + 1
            picture = event.data["preview"].partition(",")[2]
            said = {"partial_image_index": index, "b64_json": picture, "created_at": int(time.time())}
            yield _event(f"{kind}.partial_image", {**said, **_said(body, job), "output_format": "jpeg"})
    try:
        check(job)
    except HTTPException as error:
        yield _event("error", error_of(error.status_code, str(error.detail)))
        return
    for file in await run_in_threadpool(pictures_of, queue, job, body.sides, body.output_format):
        said = {"b64_json": base64.b64encode(file).decode(), "created_at": int(time.time())}
        yield _event(f"{kind}.completed", {**said, **_said(body, job), "usage": _USAGE})


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _said(body: Generation, job: Job) -> dict[str, Any]:
    height, width = body.sides or job.size
    return {
        "size": f"{width}x{height}",
        "quality": body.quality or "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }


def _pairs(job: Job, files: list[bytes]) -> list[tuple[bytes, Mapping[str, Any]]]:
    return list(zip(files, [picture for _, picture in sorted(job.pictures.items())], strict=True))


def _datum(file: bytes, id: str | None, request: Request) -> dict[str, str]:
    """A picture as base64 text, or its URL."""
    if id is None:
        return {"b64_json": base64.b64encode(file).decode()}
    return {"url": f"{request.base_url}api/pictures/{id}/file"}


def _model(id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": "cascade"}


def _check_format(body: Generation, keeps: bool) -> None:
    if body.response_format == "url" and not keeps:
        raise CascadeError("response_format: url; a replica keeps no pictures for others, expected b64_json")


def error_of(status: int, message: str) -> dict[str, Any]:
    """An error in the format of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
