"""Synchronous requests: from a requested size to a job, and from a finished job to a response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from cascade.arguments import common_step
from cascade.pipeline import CascadePipeline
from cascade.server.api import client_of
from cascade.server.asked import MOST_PIXELS, Asked
from cascade.server.events import Event
from cascade.server.jobs import Job, State
from cascade.server.pictures import as_sent
from cascade.server.queue import Queue

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
