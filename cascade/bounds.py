"""Numbers that nobody means: above these, a run hangs or takes all memory, and whoever wrote them mistyped.

Every bound is far above what is in use, and its reason stands in the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


@dataclass(frozen=True)
class AtMost:
    """Checks that a number is at most `greatest`. reason: why, to stand behind a comma."""

    greatest: int
    reason: str

    def __call__(self, value: int) -> int:
        """The value. Raises ValueError for a larger one."""
        if value > self.greatest:
            raise ValueError(f"{_plain(value)} is more than {self.greatest:,}, {self.reason}")
        return value

    @property
    def validator(self) -> AfterValidator:
        """To stand in an annotated type."""
        return AfterValidator(self)


def _plain(value: int) -> str:
    """A number of thousands of digits is not one to print."""
    return f"{value:,}" if value < 10**30 else "a number of many digits"


COUNT = AtMost(2**53, "from where on numbers are no longer exact")
WIDTH = AtMost(65_536, "several times the widest layer of any published network")
LAYERS = AtMost(1_000, "several times the deepest published network")
SIDE = AtMost(65_536, "the side of a picture that alone has 13 GB")
NOISE_STEPS = AtMost(100_000, "and a schedule holds numbers for each of its steps; 1,000 are usual")
SAMPLING_STEPS = AtMost(100_000, "each of which calls the network; up to 1,000 are usual")
TOKENS = AtMost(32_768, "and the memory of attention grows with its square")
PICTURES = AtMost(10_000_000, "which no memory holds at once")
PROCESSES = AtMost(1_024, "more than any machine has processors for")
ROUNDS = AtMost(1_000, "long after nothing changes any more")

BATCHES = AtMost(1_000_000, "and a validation of so many never ends")
_MOST_WEIGHTS = 10**12

PositiveInt = Annotated[int, Field(gt=0), COUNT.validator]
"""Of steps and pictures that come one after another."""
Width = Annotated[int, Field(gt=0), WIDTH.validator]
"""Of a layer, its heads and groups, and of embeddings."""
Layers = Annotated[int, Field(gt=0), LAYERS.validator]
Side = Annotated[int, Field(gt=0), SIDE.validator]
"""Height and width, in pixels."""
NoiseSteps = Annotated[int, Field(gt=0), NOISE_STEPS.validator]
Tokens = Annotated[int, Field(gt=0), TOKENS.validator]
Pictures = Annotated[int, Field(gt=0), PICTURES.validator]
"""That are in memory together."""
Batches = Annotated[int, Field(gt=0), BATCHES.validator]


def check_network(widths: Sequence[int], layers: Sequence[int]) -> None:
    """Raises ValueError for a network that would take minutes to be laid out alone, or that no machine holds.

    widths, layers: of each level. A layer is counted as one square matrix, which is less than any has.
    """
    LAYERS(sum(layers))
    weights = sum(width**2 * count for width, count in zip(widths, layers, strict=True))
    if weights > _MOST_WEIGHTS:
        raise ValueError(
            f"{sum(layers):,} layers of up to {max(widths):,} channels have more than {weights:,} weights, 4 bytes"
            " each; make it narrower, or give it fewer layers"
        )
