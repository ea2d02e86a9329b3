"""The part of AUTOMATIC1111's API that its clients need: txt2img, img2img, progress, interrupt, and the choices.

Source: https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. Unknown fields are ignored.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from cascade.server.api import drawn_size, finished, pictures_of, submitted
from cascade.server.asked import Asked
from cascade.server.queue import Queue
from cascade.server.sources import from_base64
from cascade.settings import parse

_SAMPLERS = {"DPM++ 2M": "dpm++", "DDIM": "ddim", "Heun": "heun", "DDPM": "ddpm"}
"""AUTOMATIC1111's sampler names; with any other name each stage uses its own sampler."""


class TextToImage(BaseModel):
    """The body of txt2img."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    batch_size: int = Field(default=1, ge=1)
    n_iter: int = Field(default=1, ge=1)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int = Field(default=512, ge=1)
    height: int = Field(default=512, ge=1)
    sampler_name: str | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the result; None with a mask: those of the picture."""
        return None if getattr(self, "mask", None) else (self.height, self.width)

    def asked(self, queue: Queue) -> Asked:
        """The request as a job; steps and guidance apply to the base stage. Raises CascadeError."""
        pipeline = queue.pipeline
        base, sampler = pipeline.stage_names[0], _SAMPLERS.get(self.sampler_name or "")
        values = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": None if self.seed < 0 else self.seed,
            "num_images_per_prompt": self.batch_size * self.n_iter,
            "steps": None if self.steps is None else {base: self.steps},
            "guidance": None if self.cfg_scale is None else {base: self.cfg_scale},
            "sampler": None if sampler is None else {base: sampler},
            **drawn_size(pipeline, self.height, self.width),
        }
        return parse(Asked, values, "request")


class ImageToImage(TextToImage):
    """The body of img2img. mask: white is redrawn. Pictures are base64, optionally as data URLs."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    denoising_strength: float = Field(default=0.75, ge=0, le=1)

    def asked(self, queue: Queue) -> Asked:
        """See `TextToImage.asked`."""
        given = [("image", self.init_images[0]), ("mask", self.mask)]
        names = {name: queue.sources.take(from_base64(text))["name"] for name, text in given if text is not None}
        size = {} if self.mask is None else dict.fromkeys(("until", "height", "width"))
        return super().asked(queue).model_copy(update={**names, **size, "strength": self.denoising_strength})


def a1111_router(queue: Queue) -> APIRouter:
    """`/sdapi/v1`."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

    @router.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> dict[str, Any]:
        """Draw pictures and wait for them."""
        return await _drawn(queue, body, request)

    @router.post("/img2img")
    async def img2img(body: ImageToImage, request: Request) -> dict[str, Any]:
        """Edit a picture and wait for the result."""
        return await _drawn(queue, body, request)

    @router.get("/progress")
    def progress() -> dict[str, Any]:
        """Progress of the current job; 0 if there is none."""
        under_way = [job for job in queue.jobs() if job.progress and not job.over]
        newest = next((progress for job in under_way for progress in job.progress.values()), None)
        return {
            "progress": newest.fraction if newest else 0.0,
            "eta_relative": queue.seconds_left(),
            "state": {"job_count": len(under_way), "interrupted": False},
            "current_image": newest.preview.partition(",")[2] if newest and newest.preview else None,
        }

    @router.post("/interrupt")
    def interrupt() -> dict[str, Any]:
        """Stop the current job."""
        for job in (job for job in queue.jobs() if job.progress and not job.over):
            queue.stop(job)
        return {}

    @router.get("/options")
    def options() -> dict[str, Any]:
        """The selected options."""
        return {"sd_model_checkpoint": queue.pipeline.name}

    @router.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        """The loaded model."""
        return [
            {
                "title": queue.pipeline.name,
                "model_name": queue.pipeline.name,
                "hash": None,
                "sha256": None,
                "filename": "",
            }
        ]

    @router.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        """The available samplers, under AUTOMATIC1111's names."""
        return [{"name": name, "aliases": [own], "options": {}} for name, own in _SAMPLERS.items()]

    return router


async def _drawn(queue: Queue, body: TextToImage, request: Request) -> dict[str, Any]:
    job = await submitted(queue, await run_in_threadpool(body.asked, queue), request)
    await finished(queue, job, request)
    files = await run_in_threadpool(pictures_of, queue, job, body.sides, "png")
    said = {"seed": job.asked.seed, "all_seeds": [job.asked.seed] * len(files), "prompt": body.prompt}
    return {
        "images": [base64.b64encode(file).decode() for file in files],
        "parameters": body.model_dump(exclude={"init_images", "mask"}),
        "info": json.dumps({**said, "width": body.width, "height": body.height, "sd_model_name": queue.pipeline.name}),
    }
