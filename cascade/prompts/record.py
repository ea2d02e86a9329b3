"""A prompt to draw with the settings of its line, or the line's defect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade.seeds import derive_seed


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw, and the settings of its line; None: the call's setting.

    index: its position among the prompts of the file, bad lines included, so that fixing one moves no other.
    conditions: values of the model's conditions, not yet checked. origin: `file:line`, for messages. sampling: further
    sampling settings by name. variation: of all noise, see `Recipe.variation_noise`. adapter_factor: a factor on the
    scales of the run's low-rank adapters.
    """

    index: int
    prompt: str
    seed: int
    origin: str = "command line"
    id: str | None = None
    negative_prompt: str | None = None
    num_images: int | None = None
    guidance: float | dict[str, float] | None = None
    steps: int | dict[str, int] | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | dict[str, float] | None = None
    regions: tuple[str, ...] | None = None
    conditions: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    variation: tuple[int, float] | None = None
    adapter_factor: float | None = None


@dataclass(frozen=True)
class Failure:
    """A line of a prompt file, or one of its pictures, that cannot be drawn, and why. index: the line's position."""

    origin: str
    reason: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class BadLineError(ValueError):
    """A defect of one line."""


def record_of(
    values: Mapping[str, Any], run_seed: int, *, earlier: int = 0, index: int = 0, origin: str
) -> PromptRecord:
    """A record of checked values. Its seed: its own; or from (run seed, id); or from (run seed, text, earlier).

    earlier: number of earlier lines with the same text.
    """
    identifier = values.get("id")
    named = ("id", identifier) if identifier else ("text", values["prompt"], earlier)
    seed = derive_seed(run_seed, *named)
    return PromptRecord(index, origin=origin, **{"seed": seed, **values})
