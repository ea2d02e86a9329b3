"""OpenAI's images API, as their own client speaks it: generations, also with partial pictures, and the list of models.

Source: https://platform.openai.com/docs/api-reference/images. Settings of ours come through `extra_body`.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from cascade.errors import CascadeError
from cascade.quoting import quoted
from cascade.server.asked import MOST_PICTURES, Asked
from cascade.server.jobs import Job
from cascade.server.queue import Queue
from cascade.server.waited import check, drawn_size, finished, pictures_of, submitted, watched
from cascade.settings import parse
from cascade.values import SETTINGS

_PRESETS = {"low": "fast", "medium": "default", "standard": "default", "high": "best", "hd": "best", "auto": None}
_OURS = ("seed", "negative_prompt", *SETTINGS)


class Generation(BaseModel):
    """The body of `/v1/images/generations`; what of theirs has no meaning here is taken and ignored."""

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
        """Height and width; None: as the model draws. Raises CascadeError."""
        if self.size in (None, "auto"):
            return None
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(self.size))
        if match is None or not int(match[1]) * int(match[2]):
            raise CascadeError(f"size: {quoted(self.size)}; expected WIDTHxHEIGHT, such as 1024x1024, or auto")
        return int(match[2]), int(match[1])

    def asked(self, queue: Queue) -> Asked:
        """The same as a job. Raises CascadeError."""
        pipeline = queue.pipeline
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
        }
        return parse(Asked, values, "request")


def openai_router(queue: Queue) -> APIRouter:
    """`/v1`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    def models() -> dict[str, Any]:
        """The one model that is loaded."""
        return {"object": "list", "data": [_model(queue)]}

    @router.get("/models/{name}")
    def model(name: str) -> dict[str, Any]:
        """The same by its name."""
        _check_model(queue, name)
        return _model(queue)

    @router.post("/images/generations", response_model=None)
    async def generations(body: Generation, request: Request) -> Response:
        """Draw, and answer with the pictures, or with a stream of what they look like on the way."""
        await run_in_threadpool(_check_model, queue, body.model)
        job = await submitted(queue, await run_in_threadpool(body.asked, queue), request)
        if body.stream:
            return StreamingResponse(_stream(queue, body, job, request), media_type="text/event-stream")
        await finished(queue, job, request)
        files = await run_in_threadpool(pictures_of, queue, job, body.sides, body.output_format)
        as_urls = body.response_format == "url" and body.sides in (None, tuple(job.plan.sizes[-1]))
        data = [_datum(file, picture["id"] if as_urls else None, request) for file, picture in _pairs(job, files)]
        return JSONResponse({"created": int(time.time()), **_said(body, job), "data": data})

    @router.post("/images/edits")
    @router.post("/images/variations")
    async def edits() -> None:
        """Not yet."""
        raise HTTPException(501, "this server draws pictures; it does not edit them yet")

    return router


async def _stream(queue: Queue, body: Generation, job: Job, request: Request) -> AsyncIterator[str]:
    """Partial pictures at equal distances, then the finished one: what the base stage saw, then what stands."""
    sent: dict[int, int] = {}
    async for event in watched(queue, job, request):
        number = int(event.data.get("number", 0))
        index = sent.get(number, 0)
        due = event.kind == "step" and event.data["fraction"] >= (index + 1) / (body.partial_images + 1)
        if due and index < body.partial_images and event.data["preview"]:
            sent[number] = index + 1
            picture = event.data["preview"].partition(",")[2]
            said = {"partial_image_index": index, "b64_json": picture, "created_at": int(time.time())}
            yield _event("image_generation.partial_image", {**said, **_said(body, job), "output_format": "jpeg"})
    try:
        check(job)
    except HTTPException as error:
        yield _event("error", error_of(error.status_code, str(error.detail)))
        return
    for file in await run_in_threadpool(pictures_of, queue, job, body.sides, body.output_format):
        said = {"b64_json": base64.b64encode(file).decode(), "created_at": int(time.time())}
        yield _event("image_generation.completed", {**said, **_said(body, job), "usage": _USAGE})


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _said(body: Generation, job: Job) -> dict[str, Any]:
    height, width = body.sides or job.plan.sizes[-1]
    return {
        "size": f"{width}x{height}",
        "quality": body.quality or "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }


def _pairs(job: Job, files: list[bytes]) -> list[tuple[bytes, Mapping[str, Any]]]:
    return list(zip(files, [picture for _, picture in sorted(job.pictures.items())], strict=True))


def _datum(file: bytes, id: str | None, request: Request) -> dict[str, str]:
    """A picture as text, or where it lies."""
    if id is None:
        return {"b64_json": base64.b64encode(file).decode()}
    return {"url": f"{request.base_url}api/pictures/{id}/file"}


def _model(queue: Queue) -> dict[str, Any]:
    return {"id": queue.pipeline.name, "object": "model", "created": 0, "owned_by": "cascade"}


def _check_model(queue: Queue, name: str | None) -> None:
    own = queue.pipeline.name
    if name not in (None, own):
        raise HTTPException(404, f"model {quoted(name)} is not here; this server has {quoted(own)}")


def error_of(status: int, message: str) -> dict[str, Any]:
    """An error in the shape that their clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
