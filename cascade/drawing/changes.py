"""The arguments for changing a picture and for regions with prompts of their own, checked for recipe and engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from cascade.config.stage import StageConfig
from cascade.drawing.arguments import PerStage, check_stages, common_step, integer, one_of, positive
from cascade.drawing.edit import SIDES, Edit, ImageLike, edit_of, extended, read_mask, read_picture
from cascade.drawing.recipe import Region
from cascade.errors import CascadeError, quoted
from cascade.pictures.format import PictureFormat
from cascade.pictures.images import digest_of
from cascade.seeds import MAX_SEED
from cascade.settings import ROUNDS

DEFAULT_STRENGTH = 0.85
"""Strength for a picture without a mask; with a mask the default is 1, new content without the old one."""
REDRAWN = 0.7
"""Strength of the first stage from which the larger stages start with noise alone. From about there on shapes move, and
the old shapes would show through a larger stage that started with them; below it they keep the picture's detail."""


KNOWN = ("noised", "clean")
"""Ways of showing a network the pixels outside a mask."""


VARIATION_NOISE = ("start", "all")
"""What a variation moves: the initial noise, or all noise."""


@dataclass(frozen=True)
class Changes:
    """A picture to change, and how.

    image: a PIL picture, a path, or NumPy uint8 (H, W, 3 or 4). mask: white where it is redrawn. extend: instead of a
    mask, pixels to add at its sides `left`, `top`, `right` and `bottom`, as {"left": 64}. strength: in [0, 1], of the
    first stage, from which that of the others follows, or {stage: value}: 0 returns the picture, 1 ignores it.
    resampling: repetitions of each step where a mask keeps a part. known: "noised" or "clean", how the network sees
    that part, see `Recipe.known`. variation: (seed, share in [0, 1]): other initial noise, and how far to go towards
    it; needs no picture. variation_noise: "start", or "all" for all noise.
    """

    image: ImageLike | None = None
    mask: ImageLike | None = None
    strength: PerStage[float] = None
    extend: Mapping[str, int] | None = None
    resampling: int = 1
    variation: tuple[int, float] | None = None
    known: str = "noised"
    variation_noise: str = "start"

    def resolve(
        self, stages: Sequence[StageConfig], size: tuple[int, int], asked: bool
    ) -> tuple[Edit | None, tuple[int, int], dict[str, Any]]:
        """(the edit, the size to draw, the recipe's entries for both). Raises CascadeError.

        size: the size to draw without a picture. asked: whether the caller chose it.
        """
        entries = self._variation()
        if self.image is None:
            for name in ("mask", "strength", "extend"):
                if getattr(self, name) is not None:
                    raise CascadeError(f"{name}: there is no picture to change; give one as image")
            if self.known != KNOWN[0]:
                raise CascadeError("known: there is no picture to change; give one as image, and a mask")
            return None, size, entries
        form = stages[-1].pictures
        image, mask = self._pictures(self.image, form)
        fitting = fitting_size(stages, (image.shape[-2], image.shape[-1]))
        edit, size = edit_of(image, mask, [size] if asked else [size, fitting], form)
        entries |= {
            "image": digest_of(image),
            "mask": "" if mask is None else digest_of(mask),
            "strength": self._strengths([stage.name for stage in stages]),
            "resampling": positive("resampling", self.resampling, ROUNDS),
            "known": self._known(),
        }
        return edit, size, entries

    def _pictures(self, given: ImageLike, form: PictureFormat) -> tuple[Tensor, Tensor | None]:
        """The picture (C, H, W) as stored, and its mask (H, W), including the canvas that `extend` adds."""
        image = read_picture(given, form)[0]
        if self.extend is None:
            return image, None if self.mask is None else read_mask(self.mask)
        if self.mask is not None:
            raise CascadeError("extend: there is a mask already; give one of the two")
        check_stages("extend", self.extend, SIDES, "side")
        return extended(image, **{side: integer(f"extend.{side}", pixels) for side, pixels in self.extend.items()})

    def _variation(self) -> dict[str, Any]:
        if self.variation is None:
            return {}
        seed, share = integer("variation", self.variation[0]), self.variation[1]
        if not 0 <= seed <= MAX_SEED or not 0 <= share <= 1:
            raise CascadeError(f"variation: ({seed}, {share:g}); expected a seed, and a share from 0 to 1")
        noise = one_of("variation_noise", self.variation_noise, VARIATION_NOISE)
        return {"variation": float(share), "variation_seed": seed, "variation_noise": noise}

    def _known(self) -> str:
        known = one_of("known", self.known, KNOWN)
        if known != "noised" and self.mask is None and self.extend is None:
            raise CascadeError("known: is for the pixels outside a mask; give a mask, or extend")
        return known

    def _strengths(self, stages: Sequence[str]) -> dict[str, float]:
        """Strength by stage, without stages of full strength."""
        default = DEFAULT_STRENGTH if self.mask is None and self.extend is None else 1.0
        if isinstance(self.strength, Mapping):
            check_stages("strength", self.strength, stages)
            given = {name: self.strength.get(name, 1.0) for name in stages}
        else:
            first = default if self.strength is None else self.strength
            given = {name: min(1.0, first / REDRAWN) if place else first for place, name in enumerate(stages)}
        for value in given.values():
            if not 0 <= value <= 1:
                raise CascadeError(f"strength: {value:g}; expected 0, which returns the picture, to 1")
        return {name: float(value) for name, value in given.items() if value < 1}


def fitting_size(stages: Sequence[StageConfig], picture: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of about a picture's aspect ratio, the longer side that of the last stage."""
    step, longest = common_step(stages), stages[-1].resolution
    height, width = (max(step, round(side * longest / max(picture) / step) * step) for side in picture)
    return height, width


# --- regions ---------------------------------------------------------------------------------------------------------
# Regions: parts of a picture with their own prompts, as callers give them, for the recipe and the engine.

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
