"""The script of a picture: the prompts that it follows, by phase of sampling and by region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.text.language import Phase, Portion, read_prompt

if TYPE_CHECKING:
    from cascade.drawing.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """One prompt of a phase. weight: see `Portion`. region: index in the recipe; None: the whole picture."""

    text: str
    weight: float = 1.0
    region: int | None = None


@dataclass(frozen=True)
class Scene:
    """A phase: the share of the steps at which it starts, its prompts, and its negative prompts."""

    start: float
    own: tuple[Line, ...]
    null: tuple[Line, ...]

    @property
    def is_plain(self) -> bool:
        """Whether there is one prompt of weight 1, and one negative prompt."""
        return len(self.own) == len(self.null) == 1 and self.own[0].weight == 1


Script = tuple[Scene, ...]
"""The phases of a picture in order, the first from 0."""


def script_of(recipe: Recipe) -> Script:
    """The script in a recipe. Raises PromptSyntaxError for a prompt in the prompt language with a mistake."""
    regions = tuple(region.prompt for region in recipe.regions)
    return _script(recipe.prompt, recipe.negative_prompt, regions, recipe.language)


@lru_cache(maxsize=1024)
def _script(prompt: str, negative: str, regions: tuple[str, ...], language: bool) -> Script:
    tracks = [(_phases(prompt, language), None), *((_phases(text, language), i) for i, text in enumerate(regions))]
    nulls = _phases(negative, language)
    starts = sorted({phase.start for phases in [nulls, *(phases for phases, _ in tracks)] for phase in phases})
    return tuple(
        Scene(
            start,
            tuple(Line(one.text, one.weight, region) for phases, region in tracks for one in _acting(phases, start)),
            tuple(Line(one.text, one.weight) for one in _acting(nulls, start)),
        )
        for start in starts
    )


def _phases(text: str, language: bool) -> tuple[Phase, ...]:
    return read_prompt(text) if language else (Phase(0.0, (Portion(text),)),)


def _acting(phases: Sequence[Phase], share: float) -> tuple[Portion, ...]:
    return [phase for phase in phases if phase.start <= share][-1].portions


def layered(masks: Sequence[Tensor]) -> list[Tensor]:
    """Weights of the ground and of each region, which add up to 1 in each pixel; a later region lies above.

    masks: (h, w) in [0, 1], of the regions in order.
    """
    above, weights = torch.ones_like(masks[0]), list[Tensor]()
    for mask in reversed(masks):
        weights.insert(0, mask * above)
        above = above * (1 - mask)
    return [above, *weights]
