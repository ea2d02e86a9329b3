"""A task: one picture to draw, stage after stage; and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from cascade.config.sampling import SamplingConfig
from cascade.drawing.edit import Edit, digest_of
from cascade.drawing.recipe import Recipe
from cascade.slots import StageSlot
from cascade.text.embeddings import TextEmbeddings


@dataclass(frozen=True)
class Pass:
    """One stage's part in a picture.

    size: height and width of what it draws. number: see `Recipe.number`; a stage that is passed twice draws other noise
    the second time. strength: see `Recipe.strength`. tile: side of the squares in which it is drawn, see `Stage.tiled`;
    None: in one piece.
    """

    slot: StageSlot
    size: tuple[int, int]
    settings: SamplingConfig
    number: int
    strength: float = 1.0
    tile: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to draw. It knows nothing of files; equal only to itself.

    start: (3, h, w) uint8, the smaller picture with which the first pass begins, and whose digest the recipe's `source`
    is; None: the first pass is a base stage's.
    edit: the picture that is changed, whose digests the recipe has.
    text: embeddings of one prompt that take the place of the recipe's. name: tells it from others with the same
    recipe where half-drawn pictures wait on a disk.
    """

    recipe: Recipe
    passes: Sequence[Pass]
    start: Tensor | None = None
    edit: Edit | None = None
    text: TextEmbeddings | None = None
    name: str = ""

    def __post_init__(self) -> None:
        assert (self.start is None) == (not self.recipe.source), "a recipe names the picture that it begins with"
        assert (self.edit is None) == (not self.recipe.image), "a recipe names the picture that it changes"


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    pixels: (3, H, W) uint8 of each pass, in order: all of them where they are kept, else of the last alone.
    seconds: its share of the time. batch_sizes: by stage; with the recipe, the model and the machine they decide the
    bytes.
    """

    task: Task
    pixels: Sequence[Tensor]
    seconds: float
    batch_sizes: Mapping[str, int]


@dataclass(frozen=True)
class Undrawn:
    """A picture that could not be drawn, while others can."""

    task: Task
    reason: str


Result: TypeAlias = Drawn | Undrawn


@dataclass(frozen=True)
class Step:
    """A sampling step that is done.

    step: from 0, of `steps`. batch: from 0, of the `batches` of this stage that are drawn in one go. tasks: whose
    pictures these are. x_hat: (B, 3, H, W), one for each of them: the clean pictures as the network sees them now, in
    about [-1, 1].
    """

    stage: str
    step: int
    steps: int
    batch: int
    batches: int
    tasks: Sequence[Task]
    x_hat: Tensor


def passes(slots: Iterable[StageSlot], sizes: Iterable[tuple[int, int]], recipe: Recipe) -> list[Pass]:
    """The way of a picture through the stages of a cascade, the smallest first."""
    return [
        Pass(slot, size, recipe.stages[name], recipe.number, recipe.strength.get(name, 1.0))
        for slot, size in zip(slots, sizes, strict=True)
        for name in [slot.config.name]
    ]


def enlarging(
    slot: StageSlot, start: Tensor, prompt: str, settings: SamplingConfig, seed: int = 0, number: int = 0
) -> Task:
    """A single super-resolution stage's picture from a smaller one: start, (3, h, w) uint8, becomes scale times it."""
    height, width = (side * slot.config.scale for side in start.shape[-2:])
    recipe = Recipe(
        prompt=prompt,
        negative_prompt="",
        seed=seed,
        number=number,
        height=height,
        width=width,
        stages={slot.config.name: settings},
        source=digest_of(start),
    )
    return Task(recipe, [Pass(slot, (height, width), settings, number)], start=start)
