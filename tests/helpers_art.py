"""Pictures and tiny stages for the scripts that train on one device."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from cascade.data.scenes import Scene, SceneObject, draw

BASE = """
stage:
  name: base
  resolution: 64
  parameterization: v
  schedule: {kind: cosine, log_snr_min: -11, log_snr_max: 12}
  model: {channels: [16, 16], blocks: [1, 1], strides: [2, 2], attention: [false, true], patch: 2, skips: add,
    norm: pixel, head_dim: 8, embedding_dim: 16, text_dim: 32}
  sampling: {sampler: dpm++, steps: 2, guidance: 2.0, guidance_interval: [-12, 1]}
"""
LARGE = """
stage:
  name: sr256
  resolution: 256
  low_resolution: 64
  parameterization: v
  schedule: {kind: cosine, log_snr_min: -11, log_snr_max: 12}
  model: {channels: [8, 16], blocks: [1, 1], strides: [2, 2], attention: [false, true], patch: 4, skips: add,
    norm: pixel, head_dim: 8, embedding_dim: 16, text_dim: 32}
  sampling: {sampler: dpm++, steps: 2}
"""


def encoded(image: Image.Image) -> bytes:
    """Lossless."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def picture(colour: str, size: int = 256, x: float = 0.5) -> Image.Image:
    """A star on white, left or right of the middle."""
    return draw(Scene((SceneObject("star", colour, "small", x, 0.4, 0.2),)), size)


def record(image: Image.Image, style: str, *captions: str) -> dict[str, Any]:
    return {
        "image": {"bytes": encoded(image), "path": None},
        "style": style,
        "caption_styled": captions[0],
        "captions": list(captions),
        "lossless": True,
    }
