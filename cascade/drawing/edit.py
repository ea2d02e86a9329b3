"""Editing: a picture that is changed, the part of it that is drawn, and how that part is put back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.diffusion.editing import Known
from cascade.errors import CascadeError
from cascade.images import downsample, to_float, to_uint8, upsample

_CONTEXT = 1.5
"""The side of what is drawn, in those of the mask: the network must see what the new part is to fit."""


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, picture: Tensor) -> Tensor:
        """The part of (..., H, W)."""
        return picture[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Edit:
    """A picture to be changed.

    image: (3, H, W) uint8. mask: (H, W) float32 in [0, 1], 1 where it is drawn anew, 0 where it stays in every bit;
    None: all of it is drawn anew. box: what is drawn, as a part of the picture; the rest is not looked at.
    """

    image: Tensor
    mask: Tensor | None
    box: Box

    def known(self, size: tuple[int, int], strength: float, rounds: int) -> Known:
        """What a stage that draws `size` knows of the picture; a batch of one, on the CPU."""
        x = resized(to_float(self.box.cut(self.image))[None], size).clamp(-1, 1)
        mask = None if self.mask is None else resized(self.box.cut(self.mask)[None, None], size).clamp(0, 1)
        return Known(x, mask, strength, rounds)

    def finished(self, drawn: Tensor) -> Tensor:
        """The whole picture, (3, H, W) uint8, with what was drawn, (3, h, w) uint8, in its place."""
        if self.mask is None:
            return drawn
        part, mask = self.box.cut(self.image), self.box.cut(self.mask)
        size = (self.box.height, self.box.width)
        new = drawn if tuple(drawn.shape[-2:]) == size else to_uint8(resized(to_float(drawn)[None], size)[0])
        blended = torch.lerp(part.float(), new.float(), mask).round().to(torch.uint8)
        whole = self.image.clone()
        self.box.cut(whole)[:] = torch.where(mask > 0, blended, part)
        return whole


def edit_of(image: Tensor, mask: Tensor | None, sizes: Sequence[tuple[int, int]]) -> tuple[Edit, tuple[int, int]]:
    """An edit, and the (height, width) that is drawn for it.

    image: (3, H, W) uint8. mask: (H, W) in [0, 1]. sizes: that may be drawn, the preferred one first. A picture whose
    mask is small, and that is larger than what is drawn, gives the mask's neighbourhood alone, in the shape of the
    first size that leaves room for it; any other is drawn whole, at the last size. Raises CascadeError for a mask of
    another size, and for one that is empty.
    """
    height, width = image.shape[-2:]
    whole = Box(0, 0, height, width)
    if mask is None:
        return Edit(image, None, whole), sizes[-1]
    if tuple(mask.shape) != (height, width):
        raise CascadeError(f"mask: {mask.shape[1]}x{mask.shape[0]}; expected {width}x{height}, as the picture has it")
    places = mask.nonzero()
    if not len(places):
        raise CascadeError("mask: is black everywhere, so nothing would be drawn; paint white what is to change")
    (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    for size in sizes:
        if size == (height, width):
            return Edit(image, mask, whole), size
        box = _around((top, left, bottom, right), (height, width), size)
        if box is not None:
            return Edit(image, mask, box), size
    return Edit(image, mask, whole), sizes[-1]


def _around(mask: tuple[int, int, int, int], picture: tuple[int, int], size: tuple[int, int]) -> Box | None:
    """The neighbourhood of a mask (top, left, bottom, right) in the shape of `size`; None: the whole picture is it.

    No smaller than what is drawn, so that nothing known is enlarged only to be reduced again.
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
    """(1, C, H, W) as area means where it becomes smaller, bicubic where it becomes larger."""
    height, width = picture.shape[-2:]
    smaller = (min(size[0], height), min(size[1], width))
    reduced = picture if smaller == (height, width) else downsample(picture, smaller)
    return reduced if smaller == tuple(size) else upsample(reduced, size)


SIDES = ("left", "top", "right", "bottom")


def extended(image: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """A larger canvas around a picture (3, H, W) uint8, and the mask of what is to be drawn: (3, H', W'), (H', W').

    left, ...: pixels to add. Beyond the picture its edge is repeated, which is what the mask's soft side shows through.
    Raises CascadeError for negative numbers and for none at all.
    """
    sides = (left, right, top, bottom)
    if min(sides) < 0 or not any(sides):
        raise CascadeError(f"extend: {left}, {top}, {right}, {bottom}; expected pixels to add, at least on one side")
    canvas = F.pad(image[None].float(), sides, mode="replicate")[0].to(torch.uint8)
    mask = F.pad(torch.zeros(image.shape[-2:]), sides, value=1.0)
    return canvas, mask


def digest_of(pixels: Tensor) -> str:
    """SHA-256 of a picture or a mask, of its shape and its values: what a recipe knows of it."""
    values = pixels.contiguous().numpy()
    return hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes()).hexdigest()
