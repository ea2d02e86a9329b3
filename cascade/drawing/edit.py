"""Editing: a picture to change, the part of it to draw, and the blending of that part back into it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.diffusion.editing import Known
from cascade.errors import CascadeError
from cascade.images import downsample, upsample
from cascade.pixels import RGB, PictureFormat

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


def digest_of(pixels: Tensor) -> str:
    """SHA-256 of the shape and values of a picture or mask, for the recipe."""
    values = pixels.contiguous().numpy()
    return hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes()).hexdigest()
