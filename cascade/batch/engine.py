"""Drawing a window of pictures: each text encoded once, then stage after stage, in batches of one shape."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.arguments import stage_sizes
from cascade.batch.plan import DrawOptions, Task
from cascade.checkpoint import atomic_file
from cascade.config import SamplingConfig
from cascade.diffusion.samplers import OnStep
from cascade.drawing import Picture, Texts, draw_batch
from cascade.images import to_uint8
from cascade.machine import is_out_of_memory
from cascade.pipeline import CascadePipeline
from cascade.slots import StageSlot, not_finite, running
from cascade.stage import Stage
from cascade.text.embeddings import TextEmbeddings, join

LARGEST_AUTO_BATCH = 64
"""Where `--batch-size auto` begins on a GPU."""
_AUTO_BATCH_ON_CPU = 4  # larger ones bring little there, and the kernel kills what takes too much
_BYTES_PER_ACTIVATION = 4 * 96  # float32, and about as many maps of the first level alive at once


@dataclass(frozen=True)
class Drawn:
    """A finished picture. stages: by resolution, the last one and those that are kept; seconds: its share of the time.

    batch_sizes: by stage, which together with the settings makes its bytes.
    """

    task: Task
    stages: dict[int, Image.Image]
    seconds: float
    batch_sizes: dict[str, int]

    @property
    def image(self) -> Image.Image:
        """The picture of the last stage."""
        return self.stages[max(self.stages)]


@dataclass(frozen=True)
class Undrawn:
    """A picture that could not be drawn, while others can."""

    task: Task
    reason: str


Result: TypeAlias = Drawn | Undrawn


_KEPT_TEXTS = 256
"""Embeddings that stay between windows."""


class StoppedError(Exception):
    """The run was asked to stop, between two batches."""


class Shelf:
    """Pictures on their way from one stage to the next: in memory, or as files that a restart finds again."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held if self._folder is None else self._path(key).exists()

    def put(self, key: str, pixels: Tensor) -> None:
        """pixels: (3, H, W) uint8."""
        if self._folder is None:
            self._held[key] = pixels
        else:
            with atomic_file(self._path(key)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels.numpy())

    def get(self, key: str) -> Tensor:
        """(3, H, W) uint8."""
        return self._held[key] if self._folder is None else torch.from_numpy(np.load(self._path(key)))

    def drop(self, key: str) -> None:
        """Forget a picture, if it is there."""
        self._held.pop(key, None)
        if self._folder is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.npy"


class Engine:
    """Draws windows of pictures with one pipeline.

    shelf: where smaller pictures wait; they are looked up by everything that made them. stop: asked between batches.
    on_step(stage, step, steps): called after each step of a batch.
    """

    def __init__(
        self,
        pipeline: CascadePipeline,
        options: DrawOptions,
        *,
        shelf: Shelf | None = None,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Raises CascadeError for sizes that this cascade cannot draw."""
        self.pipeline, self.options = pipeline, options
        self.slots = pipeline.slots_until(options.until)
        self.sizes = stage_sizes([slot.config for slot in self.slots], options.height, options.width)
        self._shelf, self._stop = shelf or Shelf(), stop
        self._texts = _Texts(pipeline)
        self._on_step = on_step
        self._batch_sizes = {
            slot.config.name: self._first_batch_size(slot, size)
            for slot, size in zip(self.slots, self.sizes, strict=True)
        }
        self.network_seconds = 0.0

    @property
    def window(self) -> int:
        """Prompts that are drawn together: the same in every process, whatever memory each of them finds free."""
        largest = self._largest_auto if self.options.batch_size == "auto" else max(self._batch_sizes.values())
        return self.options.window or max(1, largest // self.options.num_images)

    @property
    def _largest_auto(self) -> int:
        return _AUTO_BATCH_ON_CPU if self.pipeline.device.type == "cpu" else LARGEST_AUTO_BATCH

    @torch.inference_mode()
    def draw(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """The pictures of `tasks`, each as soon as its last stage is done."""
        start = time.perf_counter()
        texts = self._texts.window(
            [text for task in tasks for text in (task.job.record.prompt, task.job.negative_prompt)]
        )
        seconds = dict.fromkeys(tasks, (time.perf_counter() - start) / len(tasks))
        alive = list(tasks)
        for position, slot in enumerate(self.slots):
            todo = [
                task
                for task in alive
                if position == len(self.slots) - 1 or self._key(task, position) not in self._shelf
            ]
            if not todo:
                continue  # a restart finds all of them on the shelf
            with running(slot) as stage:
                for batch, pixels, took in self._batches(stage, position, todo, texts):
                    for task, picture in zip(batch, pixels, strict=True):
                        seconds[task] += took / len(batch)
                        if picture is None:
                            alive.remove(task)
                            yield Undrawn(task, not_finite(stage.name))
                        elif position < len(self.slots) - 1:
                            self._shelf.put(self._key(task, position), picture)
                        else:
                            yield self._finished(task, picture, seconds[task])
                del stage  # `--low-memory`: it must be gone before the next one is loaded
        for task in tasks:
            for position in range(len(self.slots) - 1):
                self._shelf.drop(self._key(task, position))

    def _batches(
        self, stage: Stage, position: int, tasks: Sequence[Task], texts: _Rows
    ) -> Iterator[tuple[Sequence[Task], list[Tensor | None], float]]:
        """(pictures, their pixels or None where not finite, seconds), batch by batch of equal settings."""
        for settings, group in _by_settings(tasks, stage.name):
            rest = group
            while rest:
                if self._stop() and len(tasks) > self._batch_sizes[stage.name]:
                    raise StoppedError
                start = time.perf_counter()
                batch = rest[: self._batch_sizes[stage.name]]
                try:
                    pixels = self._draw(stage, position, settings, batch, texts)
                except (RuntimeError, MemoryError) as error:
                    if not self._halved(stage.name, error):
                        raise
                    continue
                took = time.perf_counter() - start
                self.network_seconds += took
                yield batch, pixels, took
                rest = rest[len(batch) :]

    def _draw(
        self, stage: Stage, position: int, settings: SamplingConfig, batch: Sequence[Task], texts: _Rows
    ) -> list[Tensor | None]:
        """One batch, filled to its size with repetitions of its last picture, so that every call has one shape."""
        full = [*batch, *[batch[-1]] * (self._batch_sizes[stage.name] - len(batch))]
        low = None
        if position:
            low = torch.stack([self._shelf.get(self._key(task, position - 1)) for task in full])
        x = draw_batch(
            stage,
            settings,
            self.sizes[position],
            [Picture(row, task.job.record.seed, task.number) for row, task in enumerate(full)],
            Texts(
                own=texts([task.job.record.prompt for task in full]),
                null=texts([task.job.negative_prompt for task in full]),
            ),
            low,
            self._steps(stage.name, stage.count_steps(settings)),
            device=self.pipeline.device,
        )[: len(batch)]
        finite = torch.isfinite(x).flatten(1).all(dim=1).tolist()
        pixels = to_uint8(x).cpu()
        return [picture if good else None for picture, good in zip(pixels, finite, strict=True)]

    def _steps(self, stage: str, steps: int) -> OnStep | None:
        tell = self._on_step
        return None if tell is None else lambda step, _x_hat: tell(stage, step, steps)

    def _halved(self, stage: str, error: BaseException) -> bool:
        """Whether a smaller batch is worth a try."""
        if self.options.batch_size != "auto" or self._batch_sizes[stage] == 1 or not is_out_of_memory(error):
            return False
        self._batch_sizes[stage] //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _first_batch_size(self, slot: StageSlot, size: tuple[int, int]) -> int:
        if isinstance(self.options.batch_size, int):
            return self.options.batch_size
        if isinstance(self.options.batch_size, Mapping):
            return self.options.batch_size[slot.config.name]
        if self.options.batch_size is None:
            return self.pipeline.default_batch_size
        if self.pipeline.device.type != "cpu":
            return self._largest_auto
        needed = size[0] * size[1] * slot.config.model.channels[0] * _BYTES_PER_ACTIVATION
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(1, min(self._largest_auto, free // (2 * needed)))

    def _finished(self, task: Task, pixels: Tensor, seconds: float) -> Drawn:
        stages = {self.slots[-1].config.resolution: _image(pixels)}
        if self.options.save_stages:
            for position, slot in enumerate(self.slots[:-1]):
                stages[slot.config.resolution] = _image(self._shelf.get(self._key(task, position)))
        return Drawn(task, stages, seconds, dict(self._batch_sizes))

    def _key(self, task: Task, position: int) -> str:
        """Names the picture of a task at a stage by all that made it."""
        job = task.job
        made_by = [
            [job.record.index, job.record.prompt, job.negative_prompt, job.record.seed, task.number],
            *[
                [slot.config.name, *size, job.settings[slot.config.name].model_dump(mode="json")]
                for slot, size in zip(self.slots[: position + 1], self.sizes, strict=False)
            ],
        ]
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:32]


_Rows: TypeAlias = Callable[[Sequence[str]], TextEmbeddings]
"""The embeddings of texts, a row each."""


class _Texts:
    """Embeddings of the texts of late: each is encoded once, and a run of equal prompts once in all."""

    def __init__(self, pipeline: CascadePipeline) -> None:
        self._pipeline = pipeline
        self._known: dict[str, TextEmbeddings] = {}

    def window(self, texts: Sequence[str]) -> _Rows:
        """Rows for any of `texts`."""
        unique = dict.fromkeys(texts)
        missing = [text for text in unique if text not in self._known]
        if missing:
            embeddings = self._pipeline.encode(missing)
            self._known |= {text: embeddings.select([row]) for row, text in enumerate(missing)}
        table = {text: row for row, text in enumerate(unique)}
        self._known |= {text: self._known.pop(text) for text in unique}  # those of late stand last
        joined = join([self._known[text] for text in unique])
        for text in list(self._known)[: max(0, len(self._known) - _KEPT_TEXTS)]:
            del self._known[text]
        return lambda wanted: joined.select([table[text] for text in wanted])


def _by_settings(tasks: Sequence[Task], stage: str) -> list[tuple[SamplingConfig, list[Task]]]:
    """Tasks whose settings for a stage are equal, in the order in which each first occurs."""
    groups: dict[str, tuple[SamplingConfig, list[Task]]] = {}
    for task in tasks:
        settings = task.job.settings[stage]
        groups.setdefault(settings.model_dump_json(), (settings, []))[1].append(task)
    return list(groups.values())


def _image(pixels: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> PIL."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
