"""Pictures that a user gives: read and fitted for enlarging, edited, and the drawn part blended back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.config.stage import StageConfig
from cascade.diffusion.editing import Known
from cascade.drawing.arguments import positive
from cascade.errors import CascadeError
from cascade.files.paths import expanded
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import downsample, from_pil, upsample
from cascade.pictures.rasters import read_given
from cascade.pictures.reading import open_picture, picture_errors

if TYPE_CHECKING:
    from cascade.drawing.recipe import Region


_CONTEXT = 1.5
"""Side of the drawn part relative to the mask: the network must see the surroundings that the new part should fit."""


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: Tensor) -> Tensor:
        """This part of (..., H, W)."""
        return picture[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture to change.

    image: (C, H, W) stored values of `form`. mask: (H, W) float32 in [0, 1], 1 where it is redrawn, 0 where every bit
    stays; None: all of it is redrawn. box: the part of the picture that is drawn; the rest is not used.
    """

    image: Tensor
    mask: Tensor | None
    box: Box
    form: PictureFormat = RGB

    def known(self, size: tuple[int, int], strength: float, rounds: int, clean: bool = False) -> Known:
        """The picture's part as input of a stage that draws `size`; a batch of one, on the CPU."""
        x = resized(self.form.to_float(self.box.cut(self.image))[None], size).clamp(-1, 1)
        mask = None if self.mask is None else resized(self.box.cut(self.mask)[None, None], size).clamp(0, 1)
        return Known(x, mask, strength, rounds, clean)

    def finished(self, drawn: Tensor) -> Tensor:
        """The whole picture, (C, H, W) as stored, with the drawn part (C, h, w) blended in."""
        if self.mask is None:
            return drawn
        part, mask = self.box.cut(self.image), self.box.cut(self.mask)
        size, form = (self.box.height, self.box.width), self.form
        fits = tuple(drawn.shape[-2:]) == size
        new = drawn if fits else form.from_float(resized(form.to_float(drawn)[None], size)[0])
        blended = form.stored(torch.lerp(form.linear(part), form.linear(new), mask))
        whole = self.image.clone()
        self.box.cut(whole)[:] = torch.where(mask > 0, blended, part)
        return whole


def edit_of(
    image: Tensor, mask: Tensor | None, sizes: Sequence[tuple[int, int]], form: PictureFormat = RGB
) -> tuple[Edit, tuple[int, int]]:
    """An edit, and the (height, width) to draw for it.

    image: (C, H, W) stored values of `form`. mask: (H, W) in [0, 1]. sizes: sizes that may be drawn, the preferred one
    first. If the picture is larger than the drawn size and the mask is small, only the mask's neighbourhood is drawn,
    in the shape of the first size with room for it; otherwise the whole picture, at the last size. Raises
    CascadeError for a mask of another size, and for an empty one.
    """
    height, width = image.shape[-2:]
    whole = Box(0, 0, height, width)
    if mask is None:
        return Edit(image, None, whole, form), sizes[-1]
    if tuple(mask.shape) != (height, width):
        raise CascadeError(f"mask: {mask.shape[1]}x{mask.shape[0]}; expected {width}x{height}, the picture's size")
    places = mask.nonzero()
    if not len(places):
        raise CascadeError("mask: is black everywhere, so nothing would be drawn; paint the part to change white")
    (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    for size in sizes:
        if size == (height, width):
            return Edit(image, mask, whole, form), size
        box = _around((top, left, bottom, right), (height, width), size)
        if box is not None:
            return Edit(image, mask, box, form), size
    return Edit(image, mask, whole, form), sizes[-1]


def _around(mask: tuple[int, int, int, int], picture: tuple[int, int], size: tuple[int, int]) -> Box | None:
    """The neighbourhood of a mask (top, left, bottom, right) in the shape of `size`; None: the whole picture.

    At least as large as the drawn size, so that no known pixels are enlarged only to be reduced again.
    """
    top, left, bottom, right = mask
    scale = max(1.0, _CONTEXT * (bottom - top) / size[0], _CONTEXT * (right - left) / size[1])
    height, width = math.ceil(size[0] * scale), math.ceil(size[1] * scale)
    if height > picture[0] or width > picture[1]:
        return None
    y = min(max(0, (top + bottom - height) // 2), picture[0] - height)
    x = min(max(0, (left + right - width) // 2), picture[1] - width)
    return Box(y, x, height, width)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, C, H, W) resized: area means to reduce, bicubic to enlarge."""
    height, width = picture.shape[-2:]
    smaller = (min(size[0], height), min(size[1], width))
    reduced = picture if smaller == (height, width) else downsample(picture, smaller)
    return reduced if smaller == tuple(size) else upsample(reduced, size)


SIDES = ("left", "top", "right", "bottom")


def extended(image: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """A larger canvas around a picture (C, H, W), and the mask of its new part: (C, H', W'), (H', W').

    left, ...: pixels to add. The new part repeats the picture's edge, which shows through the mask's soft side.
    Raises CascadeError for negative numbers, and if all are zero.
    """
    sides = (left, right, top, bottom)
    if min(sides) < 0 or not any(sides):
        raise CascadeError(f"extend: {left}, {top}, {right}, {bottom}; expected pixels to add, at least on one side")
    canvas = F.pad(image[None].float(), sides, mode="replicate")[0].to(image.dtype)
    mask = F.pad(torch.zeros(image.shape[-2:]), sides, value=1.0)
    return canvas, mask


def region_mask(region: Region, masks: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """A region at the size of a picture: (h, w) in [0, 1]; edges of a box between two pixels are soft.

    masks: (H, W) in [0, 1], by digest.
    """
    height, width = size
    if region.box is None:
        return resized(masks[region.mask][None, None], size).clamp(0, 1)[0, 0]
    left, top, right, bottom = region.box
    return _covered(top, bottom, height)[:, None] * _covered(left, right, width)


def _covered(start: float, end: float, count: int) -> Tensor:
    """How much of each of `count` equal parts of [0, 1] lies between start and end."""
    edges = torch.arange(count + 1, dtype=torch.float64)
    inside = (edges[1:].clamp(max=end * count) - edges[:-1].clamp(min=start * count)).clamp(min=0)
    return inside.float()


# --- upscaling -------------------------------------------------------------------------------------------------------
# Enlarging a user's picture of any size: the sequence of stages, and the padding and tiles for each.

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
