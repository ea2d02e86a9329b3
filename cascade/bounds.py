"""Upper bounds of settings. Beyond them a run would hang or take all memory, so a larger number is a typing error.

Every bound is far above any number in use; the error message gives its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


@dataclass(frozen=True)
class AtMost:
    """A check that a number is at most `greatest`. reason: a clause for the message, which follows a comma."""

    greatest: int
    reason: str

    def __call__(self, value: int) -> int:
        """`value`. Raises ValueError if it is larger than `greatest`."""
        if value > self.greatest:
            raise ValueError(f"{_plain(value)} is more than {self.greatest:,}, {self.reason}")
        return value

    @property
    def validator(self) -> AfterValidator:
        """The check as an annotation of a pydantic field."""
        return AfterValidator(self)


def _plain(value: int) -> str:
    """The number for a message; one of more than 30 digits is not printed."""
    return f"{value:,}" if value < 10**30 else "a number of many digits"


COUNT = AtMost(2**53, "above which floating-point numbers are not exact")
WIDTH = AtMost(65_536, "several times the widest layer of any published network")
LAYERS = AtMost(1_000, "several times the deepest published network")
SIDE = AtMost(65_536, "the side of a picture that takes 13 GB by itself")
NOISE_STEPS = AtMost(100_000, "and a schedule stores numbers for each of its steps; 1,000 are usual")
SAMPLING_STEPS = AtMost(100_000, "each of which calls the network; up to 1,000 are usual")
TOKENS = AtMost(32_768, "and the memory of attention grows with its square")
PICTURES = AtMost(10_000_000, "which no memory holds at once")
PROCESSES = AtMost(1_024, "more than any machine has processors for")
ROUNDS = AtMost(1_000, "long after the picture stops changing")

BATCHES = AtMost(1_000_000, "and a validation on so many never ends")
_MOST_WEIGHTS = 10**12

PositiveInt = Annotated[int, Field(gt=0), COUNT.validator]
"""A number of steps, or of pictures processed one after another."""
Width = Annotated[int, Field(gt=0), WIDTH.validator]
"""The width of a layer or an embedding, or a number of heads or groups."""
Layers = Annotated[int, Field(gt=0), LAYERS.validator]
Side = Annotated[int, Field(gt=0), SIDE.validator]
"""Height or width, in pixels."""
NoiseSteps = Annotated[int, Field(gt=0), NOISE_STEPS.validator]
Tokens = Annotated[int, Field(gt=0), TOKENS.validator]
Pictures = Annotated[int, Field(gt=0), PICTURES.validator]
"""A number of pictures in memory together."""
Batches = Annotated[int, Field(gt=0), BATCHES.validator]


def check_network(widths: Sequence[int], layers: Sequence[int]) -> None:
    """Raises ValueError for a network that would take minutes just to allocate, or that fits no machine.

    widths, layers: one per level. A layer counts as one square matrix, a lower bound for every real layer.
    """
    LAYERS(sum(layers))
    weights = sum(width**2 * count for width, count in zip(widths, layers, strict=True))
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"{sum(layers):,} layers of up to {max(widths):,} channels have more than {weights:,} weights, 4 bytes"
            " each; make it narrower, or give it fewer layers"
        )
