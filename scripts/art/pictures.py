"""Pictures from drawings: rasterised by librsvg directly at their size on white, and encoded."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips
from PIL import Image

SIZE = 1024
# Noto and Twemoji fill their box to the edge and get a margin here; Fluent has one.
DRAWN_SIZE = {"noto": 960, "twemoji": 896}
LOSSLESS: dict[str, Any] = {"format": "WEBP", "lossless": True, "quality": 100, "method": 4}
# Lossless, their soft gradients would take 0.3 MB each.
ENCODINGS: dict[str, dict[str, Any]] = {
    "fluent_color": {"format": "WEBP", "quality": 86, "method": 6},
    "fluent_3d": {"format": "JPEG", "quality": 91, "subsampling": 0},
}


@dataclass(frozen=True)
class Picture:
    """An encoded picture, and its values for the data set's columns."""

    encoded: bytes
    suffix: str
    width: int
    height: int
    lossless: bool


def make_picture(drawing: Path, style: str) -> Picture:
    """The picture of a drawing; raises pyvips.Error or OSError for a file that cannot be read."""
    image = _read_raster(drawing) if drawing.suffix == ".png" else rasterise(drawing, DRAWN_SIZE.get(style, SIZE))
    encoding = ENCODINGS.get(style, LOSSLESS)
    buffer = io.BytesIO()
    image.save(buffer, **encoding)
    suffix = "jpg" if encoding["format"] == "JPEG" else "webp"
    return Picture(buffer.getvalue(), suffix, image.width, image.height, encoding is LOSSLESS)


def rasterise(drawing: Path, size: int) -> Image.Image:
    """The SVG with its longer side `size` pixels long, in the middle of a white square of 1024 pixels."""
    vector = drawing.read_bytes()
    natural = pyvips.Image.svgload_buffer(vector)
    # Rendered at this scale, never resized: vips opens an SVG without drawing it.
    image = pyvips.Image.svgload_buffer(vector, scale=size / max(natural.width, natural.height))
    square = image.flatten(background=255).gravity("centre", SIZE, SIZE, extend="background", background=255)
    return Image.fromarray(square.cast("uchar").numpy())


def _read_raster(path: Path) -> Image.Image:
    """The publisher's picture at its original size, on white."""
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    return Image.alpha_composite(white, drawn).convert("RGB")
