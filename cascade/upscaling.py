"""Enlarging a user's picture of any size: the sequence of stages, and the padding and tiles for each."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.arguments import positive
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.files.paths import expanded
from cascade.files.picture import open_picture, picture_errors
from cascade.images import downsample, from_pil
from cascade.pixels import RGB, PictureFormat
from cascade.rasters import read_given

LARGEST_WHOLE = 2048**2
"""Pixels of the largest result that is drawn in one piece by default."""
DEFAULT_TILE = 1024
"""Side of the tiles of larger results."""

ImageLike: TypeAlias = Image.Image | str | os.PathLike[str] | np.ndarray[Any, Any]


def read_picture(image: ImageLike, form: PictureFormat = RGB) -> Tensor:
    """A picture, its file, or NumPy uint8 (H, W, 3 or 4) -> uint8 (1, 3, H, W), upright, transparency over white.

    form: the format to read; other ones than `rgb` of 8 bits take arrays (H, W, C) of their own values.

    Raises CascadeError for anything else, and for a file that cannot be read.
    """
    if isinstance(image, Image.Image) and 0 in image.size:
        raise CascadeError(f"image: a picture of {image.width}x{image.height} has no pixels")
    if not form.is_rgb and isinstance(image, (Image.Image, np.ndarray, str, os.PathLike)):
        given = image if isinstance(image, (Image.Image, np.ndarray)) else expanded(os.fsdecode(image))
        return read_given(given, form, "image")[None]
    if isinstance(image, Image.Image):
        with picture_errors("image"):
            return from_pil(image)[None]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
            raise CascadeError(f"image: an array {image.dtype} of shape {image.shape}; expected uint8 (H, W, 3 or 4)")
        return from_pil(Image.fromarray(image))[None]
    if not isinstance(image, (str, os.PathLike)):
        raise CascadeError(f"image: {type(image).__name__}; expected a PIL picture, a path or a NumPy array")
    path = expanded(os.fsdecode(image))
    with picture_errors(path), open_picture(path) as opened:
        return from_pil(opened)[None]


def read_mask(mask: ImageLike, name: str = "mask") -> Tensor:
    """A mask, its file, or NumPy bool or uint8 (H, W) -> float32 (H, W): 1 where white, 0 where black.

    Raises CascadeError for anything else, and for a file that cannot be read.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype in (np.bool_, np.uint8) and 0 not in mask.shape:
        values = torch.from_numpy(np.ascontiguousarray(mask)).float()
        return values if mask.dtype == np.bool_ else values / 255
    if isinstance(mask, np.ndarray):
        raise CascadeError(f"{name}: an array {mask.dtype} of shape {mask.shape}; expected bool or uint8 (H, W)")
    return read_picture(mask)[0].float().mean(0).div(255)


def target_size(stages: Sequence[StageConfig], size: tuple[int, int], to: int | None) -> tuple[int, int]:
    """(height, width) of the result for a picture of `size`: longer side `to`, same aspect ratio.

    to: default the last stage's size; for a picture at least that large, its size times that stage's factor.
    Raises CascadeError for a size that is not larger than the picture.
    """
    longest, last = max(size), stages[-1]
    if to is None:
        to = last.resolution if longest < last.resolution else longest * last.scale
    if positive("to", to) <= longest:
        raise CascadeError(f"to: {to}; the picture's longer side already has {longest} px, give more")
    height, width = (max(1, round(side * to / longest)) for side in size)
    return height, width


def route(stages: Sequence[StageConfig], longest: int, to: int) -> list[int]:
    """The sequence of stages that enlarges a picture to a longer side of at least `to` px, as places in `stages`.

    Each time the stage is chosen whose smaller pictures are nearest in size, counted in doublings; so pictures beyond
    the last stage's own size use it repeatedly. Raises CascadeError when no stage enlarges.
    """
    enlarging = [place for place, stage in enumerate(stages) if stage.low_resolution is not None]
    if not enlarging:
        raise CascadeError("upscale: this model has no super-resolution stage; name another with --model")
    chosen = []
    while longest < to:
        place = min(enlarging, key=lambda place: _doublings(longest, stages[place]))
        chosen.append(place)
        longest *= stages[place].scale
    return chosen


def _doublings(longest: int, stage: StageConfig) -> float:
    assert stage.low_resolution is not None
    return abs(math.log2(longest / stage.low_resolution))


def padded(pixels: Tensor, stage: StageConfig) -> Tensor:
    """The smaller picture with its last rows and columns repeated, until the network can divide the larger one."""
    step = stage.geometry.divisor
    multiple = step // math.gcd(step, stage.scale)
    bottom, right = (-side % multiple for side in pixels.shape[-2:])
    # In float, because uint8 has no kernel for this padding; the values stay whole numbers.
    return F.pad(pixels.float(), (0, right, 0, bottom), mode="replicate").to(pixels.dtype)


def fitted(pixels: Tensor, size: tuple[int, int], form: PictureFormat = RGB) -> Tensor:
    """Stored values (1, C, H, W) as area means at `size`, which is not larger."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return form.from_float(downsample(form.to_float(pixels), size))


def tile_of(tile: int | None, size: tuple[int, int], stage: StageConfig) -> int | None:
    """The side of the square tiles for a picture of `size`; None: in one piece."""
    if tile is None and size[0] * size[1] > LARGEST_WHOLE and stage.geometry.receptive_radius is not None:
        return DEFAULT_TILE
    return tile
