"""The engine: tasks in, pictures out. Every part of the package that draws gives it tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from cascade.diffusion.editing import Known
from cascade.drawing.batches import Inputs, Picture, draw_batch
from cascade.drawing.edit import padded
from cascade.drawing.slots import StageSlot, check_memory, not_finite, running
from cascade.drawing.task import Drawn, Pass, Result, Shelf, Step, Task, Undrawn, given_of
from cascade.drawing.texts import Encode, RecentTexts, Rows, Windows, form_of, script_of
from cascade.errors import CascadeError
from cascade.resources.memory import StageCost
from cascade.stage import Stage
from cascade.system.device import free_bytes, is_out_of_memory

# --- batch size ------------------------------------------------------------------------------------------------------
# The number of pictures per network call.

BatchSize: TypeAlias = int | Mapping[str, int] | str | None
"""One size for all stages, or {stage: size}; "auto": a size that should fit, halved when memory runs out; None: 1 on a
CPU, 8 on a GPU."""

_DEFAULT_ON_CPU, _DEFAULT = 1, 8
_LARGEST_ON_CPU, _LARGEST = 4, 64  # on a CPU larger batches gain little, and the kernel kills a process without memory


class BatchSizes:
    """The batch size of each stage at each picture size; with "auto" it decreases until it fits."""

    def __init__(self, size: BatchSize, device: torch.device) -> None:
        self._asked, self._device = size, device
        self._on_cpu = device.type == "cpu"
        self._sizes: dict[tuple[str, tuple[int, int]], int] = {}

    def of(self, drawing: Pass) -> int:
        """The batch size of a stage at a picture size; every call of its network has this many pictures."""
        key = (drawing.slot.config.name, drawing.size)
        if key not in self._sizes:
            self._sizes[key] = self._first(drawing)
        return self._sizes[key]

    @property
    def largest(self) -> int | None:
        """Upper bound on all batch sizes, whatever memory is free; None: it depends on the stage."""
        return self._largest if self._asked == "auto" else None

    def halve(self, drawing: Pass, error: BaseException) -> bool:
        """Halve the stage's batch size after an error, and return whether a new attempt is worthwhile."""
        size = self.of(drawing)
        if self._asked != "auto" or size == 1 or not is_out_of_memory(error):
            return False
        self._sizes[drawing.slot.config.name, drawing.size] = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    @property
    def _largest(self) -> int:
        return _LARGEST_ON_CPU if self._on_cpu else _LARGEST

    def _first(self, drawing: Pass) -> int:
        if isinstance(self._asked, int):
            return self._asked
        if isinstance(self._asked, Mapping):
            return self._asked[drawing.slot.config.name]
        if self._asked is None:
            return default_batch_size(self._device)
        if not self._on_cpu:
            return self._largest
        likely = StageCost(drawing.slot.config).likely_bytes(drawing.size)
        return max(1, min(self._largest, int(free_bytes(self._device) // (2 * likely))))


def default_batch_size(device: torch.device) -> int:
    """Pictures per network call if the caller gives no batch size."""
    return _DEFAULT_ON_CPU if device.type == "cpu" else _DEFAULT


# --- engine ----------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """The engine was stopped; pictures yielded before are finished."""


@dataclass(frozen=True)
class Conduct:
    """Settings of an engine's work. Only the batch size can change a picture, in its last bits.

    batch_size: see `drawing.engine`. keep_stages: `Drawn.pixels` includes the smaller pictures. stop: called
    between batches, True stops. abort: called after each step, True stops. on_step: called with each step; may raise.
    """

    batch_size: BatchSize = None
    keep_stages: bool = False
    stop: Callable[[], bool] = lambda: False
    abort: Callable[[], bool] | None = None
    on_step: Callable[[Step], None] | None = None


@dataclass(eq=False)
class _Work:
    """A task in progress."""

    task: Task
    seconds: float


class Engine:
    """Draws pictures of any size, settings and stages, as often as it is called.

    Pictures with equal next passes share batches of one fixed shape, so that a picture has the same bytes whatever
    else is drawn. Between stages pictures are whole numbers: the next stage sees exactly the picture that can be saved,
    and the last bits of floating-point arithmetic do not propagate.
    """

    def __init__(
        self,
        encode: Encode,
        device: torch.device,
        conduct: Conduct | None = None,
        shelf: Shelf | None = None,
        windows: Windows | None = None,
    ) -> None:
        """encode: encodes texts. device: device of the stages. shelf: storage of pictures between stages. windows: see
        `RecentTexts`."""
        self._device, self._conduct = device, conduct or Conduct()
        self._texts, self._shelf = RecentTexts(encode, windows), shelf or Shelf()
        self.batch_sizes = BatchSizes(self._conduct.batch_size, device)
        self.network_seconds = 0.0

    @torch.inference_mode()
    def draw(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """The pictures of `tasks`, each as soon as its last pass is done.

        Each stage is loaded once for all tasks. Raises CascadeError when memory does not suffice, StoppedError.
        """
        if not tasks:
            return
        start = time.perf_counter()
        texts = self._texts.of(tasks)
        share = (time.perf_counter() - start) / len(tasks)
        alive = [_Work(task, share) for task in tasks]
        for position in range(max(len(task.passes) for task in tasks)):
            for slot, group in _by_slot(alive, position):
                for result in self._passed(slot, position, group, texts):
                    alive = [work for work in alive if work.task is not result.task]
                    yield result
        for task in tasks:
            for position in range(len(task.passes) - 1):
                self._shelf.drop(shelf_key(task, position))

    def draw_all(self, tasks: Sequence[Task]) -> list[Drawn]:
        """The pictures of all tasks, in order. Raises CascadeError for a picture that cannot be drawn."""
        drawn: dict[Task, Drawn] = {}
        for result in self.draw(tasks):
            if isinstance(result, Undrawn):
                raise CascadeError(result.reason)
            drawn[result.task] = result
        return [drawn[task] for task in tasks]

    def _passed(self, slot: StageSlot, position: int, group: Sequence[_Work], texts: Rows) -> Iterator[Result]:
        """Run one stage for all works that need it; yields pictures that are finished, or failed."""
        todo = [work for work in group if _is_last(work.task, position) or not self._is_waiting(work.task, position)]
        if not todo:
            return  # after a restart all may already be on the shelf
        with running(slot) as stage:
            for batch, pixels in self._batches(stage, position, todo, texts):
                for work, picture in zip(batch, pixels, strict=True):
                    if picture is None:
                        yield Undrawn(work.task, not_finite(stage.name))
                    elif _is_last(work.task, position):
                        yield self._finished(work, picture)
                    else:
                        self._shelf.put(shelf_key(work.task, position), picture)
            del stage  # with low_memory it must be released before the next one is loaded

    def _is_waiting(self, task: Task, position: int) -> bool:
        """Whether the result of a pass is already on the shelf."""
        return shelf_key(task, position) in self._shelf

    def _batches(
        self, stage: Stage, position: int, todo: Sequence[_Work], texts: Rows
    ) -> Iterator[tuple[Sequence[_Work], list[Tensor | None]]]:
        """(works, their pixels, None for a picture that is not finite), in batches of equal settings."""
        for drawing, group in _by_pass(todo, position, texts):
            rest = group
            while rest:
                size = self.batch_sizes.of(drawing)
                if self._conduct.stop() and len(todo) > size:
                    raise StoppedError
                batch, start = rest[:size], time.perf_counter()
                place = (len(group) - len(rest)) // size, -(-len(group) // size)
                try:
                    pixels = self._drawn(stage, drawing, position, [work.task for work in batch], texts, place)
                except (RuntimeError, MemoryError) as error:
                    if not self.batch_sizes.halve(drawing, error):
                        raise
                    continue
                self._count(batch, time.perf_counter() - start)
                yield batch, pixels
                rest = rest[len(batch) :]

    def _drawn(
        self, stage: Stage, drawing: Pass, position: int, batch: Sequence[Task], texts: Rows, place: tuple[int, int]
    ) -> list[Tensor | None]:
        """Draw one batch, filled up by repeating its last picture, so that every call has one shape."""
        height, width = drawing.size
        size, dtype = self.batch_sizes.of(drawing), next(stage.network.parameters()).dtype
        check_memory(stage.config, drawing.size, size, self._device, dtype, drawing.tile)  # before any noise is drawn
        full = [*batch, *[batch[-1]] * (size - len(batch))]
        low = self._smaller(full, position)
        if low is not None:
            low = padded(low, stage.config)
            height, width = (side * stage.scale for side in low.shape[-2:])
        name, steps = stage.name, stage.count_steps(drawing.settings)

        def on_step(step: int, x_hat: Tensor) -> None:
            if self._conduct.on_step is not None:
                x_hat = x_hat[: len(batch), :, : drawing.size[0], : drawing.size[1]]
                self._conduct.on_step(Step(name, step, steps, *place, batch, x_hat))
            if self._conduct.abort is not None and self._conduct.abort():
                raise StoppedError

        inputs = Inputs(
            drawing.settings,
            (height, width),
            [_picture(row, task, position) for row, task in enumerate(full)],
            texts(full, (height, width)),
            low,
            _known(full, drawing),
            given_of(stage.config, full, drawing.size, (height, width)),
        )
        x = draw_batch(stage.tiled(drawing.tile), inputs, on_step, self._device)
        x = x[: len(batch), :, : drawing.size[0], : drawing.size[1]]
        finite = torch.isfinite(x).flatten(1).all(dim=1).tolist()
        pixels = stage.config.pictures.from_float(x).cpu()
        return [picture if good else None for picture, good in zip(pixels, finite, strict=True)]

    def _smaller(self, tasks: Sequence[Task], position: int) -> Tensor | None:
        """The smaller pictures to start from: (B, C, h, w) as stored, None for a base stage."""
        if position:
            return torch.stack([self._shelf.get(shelf_key(task, position - 1)) for task in tasks])
        starts = [task.start for task in tasks if task.start is not None]
        return torch.stack(starts) if starts else None

    def _finished(self, work: _Work, picture: Tensor) -> Drawn:
        count = len(work.task.passes)
        kept = range(count - 1) if self._conduct.keep_stages else ()
        smaller = [self._shelf.get(shelf_key(work.task, position)) for position in kept]
        sizes = {drawing.slot.config.name: self.batch_sizes.of(drawing) for drawing in work.task.passes}
        edit = work.task.edit
        return Drawn(work.task, [*smaller, edit.finished(picture) if edit else picture], work.seconds, sizes)

    def _count(self, batch: Sequence[_Work], seconds: float) -> None:
        self.network_seconds += seconds
        for work in batch:
            work.seconds += seconds / len(batch)


def _picture(row: int, task: Task, position: int) -> Picture:
    recipe = task.recipe
    other = (recipe.variation_seed, recipe.variation) if recipe.variation else None
    return Picture(row, recipe.seed, task.passes[position].number, other, recipe.variation_noise == "all")


def _known(tasks: Sequence[Task], drawing: Pass) -> Known | None:
    """The known pixels of a batch, whose pictures are either all edits or all new."""
    each = [
        task.edit.known(drawing.size, drawing.strength, task.recipe.resampling, task.recipe.known == "clean")
        for task in tasks
        if task.edit is not None
    ]
    if not each:
        return None
    masks = [known.mask for known in each if known.mask is not None]
    return replace(each[0], x=torch.cat([known.x for known in each]), mask=torch.cat(masks) if masks else None)


def _is_last(task: Task, position: int) -> bool:
    return position == len(task.passes) - 1


def shelf_key(task: Task, position: int) -> str:
    """The shelf's key for a task's picture after a pass; it depends on everything that determines the picture."""
    return "-".join(part for part in (task.recipe.digest(), str(position), task.name) if part)


def _by_slot(works: Iterable[_Work], position: int) -> list[tuple[StageSlot, list[_Work]]]:
    """Works with a pass at `position`, grouped by its stage, in order of first occurrence."""
    groups: dict[int, tuple[StageSlot, list[_Work]]] = {}
    for work in works:
        if position < len(work.task.passes):
            slot = work.task.passes[position].slot
            groups.setdefault(id(slot), (slot, []))[1].append(work)
    return list(groups.values())


def _by_pass(works: Iterable[_Work], position: int, texts: Rows) -> Iterator[tuple[Pass, list[_Work]]]:
    """Works grouped by passes that agree in all but the number, in order of first occurrence."""
    groups: dict[object, tuple[Pass, list[_Work]]] = {}
    for work in works:
        own = work.task.passes[position]
        task = work.task
        start = task.start if position == 0 else None
        shape = None if start is None else tuple(start.shape)
        edit = (
            None
            if task.edit is None
            else (
                task.edit.mask is not None,
                own.strength,
                task.recipe.resampling,
                task.recipe.known,
            )
        )
        form = form_of(script_of(task.recipe))
        key = (own.size, own.settings.model_dump_json(), own.tile, shape, edit, form, texts.width(task))
        groups.setdefault(key, (own, []))[1].append(work)
    yield from groups.values()
