"""A task: one picture to draw, stage after stage; its result; and the storage of pictures between two stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.conditioning import Given, TextEmbeddings
from cascade.conditions.settings import PictureCondition, Value
from cascade.conditions.values import joined, recorded, settled
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import StageConfig
from cascade.drawing.edit import Edit
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot
from cascade.errors import StorageError
from cascade.files.atomic import atomic_file
from cascade.files.text import open_regular
from cascade.pictures.images import digest_of


@dataclass(frozen=True)
class Pass:
    """One stage's part in drawing a picture.

    size: height and width of the stage's picture. number: see `Recipe.number`; a second pass of the same stage has
    another number, hence other noise. strength: see `Recipe.strength`. tile: side of the square tiles, see
    `Stage.tiled`; None: in one piece.
    """

    slot: StageSlot
    size: tuple[int, int]
    settings: SamplingConfig
    number: int
    strength: float = 1.0
    tile: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to draw. It has no file; a task equals only itself.

    start: (C, h, w) as stored, the smaller picture that the first pass enlarges; the recipe's `source` is its digest.
    None: the first pass is a base stage's.
    edit: the picture to change; the recipe has its digests.
    text: embeddings of one prompt that replace the recipe's. name: tells the task from others with the same recipe when
    half-drawn pictures are stored on disk. masks: (H, W) in [0, 1], of the recipe's regions, by digest. conditions:
    checked values by name; the recipe has their digests.
    """

    recipe: Recipe
    passes: Sequence[Pass]
    start: Tensor | None = None
    edit: Edit | None = None
    text: TextEmbeddings | None = None
    name: str = ""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    conditions: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.start is None) == (not self.recipe.source), "a recipe names the picture that it starts from"
        assert (self.edit is None) == (not self.recipe.image), "a recipe names the picture that it changes"


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    pixels: (C, H, W) of each pass, in order; only of the last unless stages are kept. seconds: its share of the
    time. batch_sizes: by stage; together with the recipe, the model and the machine they decide the bytes.
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

    step: from 0, of `steps`. batch: from 0, of the stage's `batches` in this call. tasks: the tasks of the pictures.
    x_hat: (B, C, H, W), one for each task: the network's current estimate of the clean pictures, in about [-1, 1].
    """

    stage: str
    step: int
    steps: int
    batch: int
    batches: int
    tasks: Sequence[Task]
    x_hat: Tensor


def passes(slots: Iterable[StageSlot], sizes: Iterable[tuple[int, int]], recipe: Recipe) -> list[Pass]:
    """The passes of a picture through the stages of a cascade, the smallest first."""
    return [
        Pass(slot, size, recipe.stages[name], recipe.number, recipe.strength.get(name, 1.0))
        for slot, size in zip(slots, sizes, strict=True)
        for name in [slot.config.name]
    ]


def enlarging(
    slot: StageSlot,
    start: Tensor,
    prompt: str,
    settings: SamplingConfig,
    seed: int = 0,
    number: int = 0,
) -> Task:
    """A task for one super-resolution stage: start, (C, h, w) as stored, enlarged by the stage's scale."""
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


def with_conditions(task: Task, given: Mapping[str, object]) -> Task:
    """The task with conditions of its stages. Raises CascadeError; see `settled`."""
    values = settled([way.slot.config.conditions for way in task.passes], given)
    recipe = task.recipe.model_copy(update={"conditions": recorded(values)})
    return replace(task, recipe=recipe, conditions=values)


def given_of(
    stage: StageConfig, tasks: Sequence[Task], size: tuple[int, int], whole: tuple[int, int]
) -> dict[str, Given]:
    """The conditions of a batch for one stage.

    size: height and width of the pictures. whole: with the padding on the right and below. Raises CascadeError for a
    condition that a task lacks.
    """
    if not stage.conditions:
        return {}
    padding = (0, whole[1] - size[1], 0, whole[0] - size[0])
    rows = []
    for task in tasks:
        missing = {name: config for name, config in stage.conditions.items() if name not in task.conditions}
        row = {**task.conditions, **settled([missing], {})}
        for name, config in stage.conditions.items():
            value = row[name]
            if isinstance(config, PictureCondition) and isinstance(value, Tensor):
                fitted = config.fitted(value, size, stage.detail(name))
                row[name] = F.pad(fitted[None].float(), padding, mode="replicate")[0].to(torch.uint8)
        rows.append(row)
    return joined(stage.conditions, rows, whole)


# --- shelf -----------------------------------------------------------------------------------------------------------
# Storage of pictures between two stages.


class Shelf:
    """Pictures on their way from one stage to the next: in memory, or in files that a restart finds again.

    A missing or damaged file raises StorageError and is removed: the next start draws it again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held if self._folder is None else self._path(key).exists()

    def put(self, key: str, pixels: Tensor) -> None:
        """Store a picture. pixels: (C, H, W) as stored."""
        if self._folder is None:
            self._held[key] = pixels
        else:
            with atomic_file(self._path(key)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels.numpy())

    def get(self, key: str) -> Tensor:
        """A stored picture, (C, H, W)."""
        return self._held[key] if self._folder is None else _read(self._path(key))

    def drop(self, key: str) -> None:
        """Remove a picture, if it is stored."""
        self._held.pop(key, None)
        if self._folder is not None:
            with suppress(OSError):  # it costs disk, no picture
                self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.npy"


def _read(path: Path) -> Tensor:
    try:
        with open_regular(path) as file:
            pixels = torch.from_numpy(np.load(file, allow_pickle=False))
        if pixels.dtype not in (torch.uint8, torch.uint16, torch.float32) or pixels.ndim != 3:
            raise ValueError("no picture")
    except (OSError, ValueError, EOFError) as error:
        with suppress(OSError):
            path.unlink()
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise StorageError(f"{path}: cannot be read: {reason or error}; start again, and it is drawn again") from None
    return pixels
