"""From a record to what a network trains on. Pictures are uint8 (3, H, W); randomness is an argument."""

from __future__ import annotations

import io
import random
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.conditioning import NULL_TEXT
from cascade.config import DataConfig, StageConfig
from cascade.data.dataset import BadRecordError, Record
from cascade.images import WHITE, downsample, from_pil, to_float, to_uint8, upsample

MAX_ASPECT = 20
"""Longer strips are bad records: padded to a square they are hardly more than white, and may not fit into memory."""


def training_picture(record: Record, data: DataConfig, stage: StageConfig, rng: random.Random) -> Tensor:
    """The picture of one view: (3, S, S), S = data.crop or stage.resolution. Raises BadRecordError.

    For super-resolution this is the large picture; the smaller one is its area mean and needs no file.
    """
    picture = decode(record)
    height, width = picture.shape[-2:]
    if data.aspect == "pad" and max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRecordError(record.origin, f"a strip of {width}x{height}, beyond {MAX_ASPECT}:1; nothing to pad")
    if not data.tiles:
        picture = square(picture, data.aspect)
    if rng.random() < data.flip:
        picture = picture.flip(-1)
    if data.jitter:
        picture = jitter(picture, data.jitter, rng)
    if not data.tiles:
        picture = resize(picture, stage.resolution)
    if data.crop is not None:
        if min(picture.shape[-2:]) < data.crop:
            size = f"{picture.shape[-1]}x{picture.shape[-2]}"
            raise BadRecordError(record.origin, f"the tile of {size} is smaller than data.crop {data.crop}")
        scale = stage.resolution // (stage.low_resolution or stage.resolution)
        picture = random_crop(picture, data.crop, scale, rng)
    return picture.contiguous()


def choose_caption(record: Record, dropout: float, rng: random.Random) -> str:
    """One of the record's variants, or with probability `dropout` the null caption. Raises BadRecordError."""
    if not record.captions:
        raise BadRecordError(record.origin, "no caption")
    caption = rng.choice(record.captions)
    return NULL_TEXT if rng.random() < dropout else caption


def decode(record: Record) -> Tensor:
    """The stored picture -> uint8 (3, H, W), upright, over white. Raises BadRecordError."""
    if record.image is None:
        raise BadRecordError(record.origin, "no picture")
    try:
        if isinstance(record.image, Image.Image):
            return from_pil(record.image)
        with Image.open(io.BytesIO(record.image) if isinstance(record.image, bytes) else record.image) as image:
            return from_pil(image)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise BadRecordError(record.origin, f"broken picture: {error}") from error


def square(picture: Tensor, aspect: Literal["crop", "pad"]) -> Tensor:
    """The central square, or the whole picture padded with white to a square."""
    height, width = picture.shape[-2:]
    size = min(height, width) if aspect == "crop" else max(height, width)
    # Negative padding crops; an odd pixel goes to the right and the bottom.
    left, top = (size - width) // 2, (size - height) // 2
    return F.pad(picture, (left, size - width - left, top, size - height - top), value=WHITE)


def resize(picture: Tensor, size: int) -> Tensor:
    """A square picture at `size`: exact area mean of a larger one; a smaller one is enlarged bicubically."""
    current = picture.shape[-1]
    if current == size:
        return picture
    change = downsample if current > size else upsample
    return to_uint8(change(to_float(picture)[None], size))[0]


def random_crop(picture: Tensor, size: int, align: int, rng: random.Random) -> Tensor:
    """A square of `size` whose corner lies on multiples of `align`.

    With `align` the scale of the stage, the area mean of the crop is the same crop of the area mean.
    """
    height, width = picture.shape[-2:]
    top = align * rng.randrange((height - size) // align + 1)
    left = align * rng.randrange((width - size) // align + 1)
    return picture[..., top : top + size, left : left + size]


def jitter(picture: Tensor, amount: float, rng: random.Random) -> Tensor:
    """Zoom by 1 +- `amount`, shift by up to `amount` of the size along each axis, white around."""
    zoom, shift_x, shift_y = (rng.uniform(-amount, amount) for _ in range(3))
    scale = 1 / (1 + zoom)
    # affine_grid maps places of the result to places of the picture, in [-1, 1]: a shift by the size is 2.
    matrix = torch.tensor([[scale, 0, 2 * shift_x], [0, scale, 2 * shift_y]])
    # The negative, because grid_sample pads with zeros and we want white.
    negative = WHITE - picture[None].to(torch.float32)
    grid = F.affine_grid(matrix[None], list(negative.shape), align_corners=False)
    moved = F.grid_sample(negative, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return (WHITE - moved[0]).round().clamp(0, WHITE).to(torch.uint8)
