"""Regions: parts of a picture with their own prompts, as callers give them, for the recipe and the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from cascade.drawing.edit import digest_of
from cascade.drawing.recipe import Region
from cascade.errors import CascadeError
from cascade.quoting import quoted
from cascade.upscaling import ImageLike, read_mask

Place: TypeAlias = Sequence[float] | ImageLike
"""A box, (left, top, right, bottom) as shares of the picture's width and height; or a mask, white in the region."""
GivenRegions: TypeAlias = Sequence[tuple[Place, str] | str]
"""(place, prompt) of each region, or `place: prompt` as one text; later ones lie above."""

_EXPECTED = "expected a box and a prompt, such as 0,0,0.5,1: a red ring; or a mask file in place of the box"


@dataclass(frozen=True)
class Regions:
    """Checked regions. entries: of the recipe. masks: (H, W) in [0, 1], by digest."""

    entries: tuple[Region, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def regions_of(given: GivenRegions | None) -> Regions:
    """Checks regions and reads their masks. Raises CascadeError."""
    entries, masks = list[Region](), dict[str, Tensor]()
    for one in given or ():
        place, prompt = _split(one) if isinstance(one, str) else one
        if not isinstance(prompt, str):
            raise CascadeError(f"regions: {quoted(prompt)} is not text; expected (place, prompt)")
        box = _box(place)
        if box is not None:
            entries.append(Region(prompt=prompt, box=box))
        else:
            mask = read_mask(place)  # type: ignore[arg-type]
            masks[digest_of(mask)] = mask
            entries.append(Region(prompt=prompt, mask=digest_of(mask)))
    return Regions(tuple(entries), masks)


def _split(text: str) -> tuple[Place, str]:
    place, separator, prompt = text.partition(": ")
    if not separator or not place.strip() or not prompt.strip():
        raise CascadeError(f"region: {quoted(text)}; {_EXPECTED}")
    numbers = place.split(",")
    if len(numbers) == 4 and all(re.fullmatch(r"\s*[\d.]+\s*", number) for number in numbers):
        try:
            return [float(number) for number in numbers], prompt.strip()
        except ValueError:
            raise CascadeError(f"region: {quoted(text)}; {_EXPECTED}") from None
    return place.strip(), prompt.strip()


def _box(place: Place) -> tuple[float, float, float, float] | None:
    """The four edges; None for a mask."""
    if not isinstance(place, (tuple, list)):
        return None
    try:
        left, top, right, bottom = (float(edge) for edge in place)
    except (TypeError, ValueError):
        raise CascadeError(f"region: {quoted(place)}; expected left, top, right and bottom") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise CascadeError(
            f"region: {left:g},{top:g},{right:g},{bottom:g}; expected left, top, right, bottom as shares from 0 to 1"
        )
    return left, top, right, bottom
