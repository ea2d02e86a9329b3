"""The plan of a batch: a record with all its settings resolved, its pictures, and their file names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from cascade.conditions.settings import Value
from cascade.conditions.values import given_values, recorded, settled
from cascade.config.sampling import SamplingConfig
from cascade.drawing.arguments import resolve_sampling, stage_sizes
from cascade.drawing.changes import Changes, Regions, regions_of
from cascade.drawing.edit import Edit
from cascade.drawing.engine import BatchSize, BatchSizes, Conduct
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot, adapters_in
from cascade.drawing.task import Pass, Task, passes
from cascade.drawing.texts import script_of
from cascade.pipeline import CascadePipeline
from cascade.prompts.records import PromptRecord

FILES_PER_FOLDER = 10_000
"""Maximum number of pictures in one folder; after that, subfolders begin."""
_NAME_LENGTH = 60


Change: TypeAlias = tuple[Edit | None, tuple[int, int], dict[str, Any]]
"""The result of `Changes.resolve`: the edit, the size to draw, and the recipe's entries for both."""


@dataclass(frozen=True)
class DrawOptions:
    """Settings of a call, which a prompt's own line may override. Names as in `CascadePipeline.__call__`.

    run_seed: the seed that those of the prompts derive from, for the manifest.
    sampling: steps, guidance, sampler, aug_level and threshold, each a value, {stage: value} or None.
    batch_size: see `drawing.engine.BatchSize`. changes: a picture to change, and how; a line may have its own.
    language, long_prompts, regions: see `Recipe`; a line may have its own regions. default_style: see `Styles.choose`.
    conditions: values by name, to which a line adds.
    window: prompts drawn together, stage after stage; None: one batch. save_stages: keep the smaller pictures.
    strict: the first failure ends the run. low_memory: smaller pictures are kept on disk between stages.
    adapted: the stages with their low-rank adapters' scales times a factor, for lines with one.
    """

    run_seed: int
    num_images: int = 1
    negative_prompt: str | None = None
    until: int | None = None
    height: int | None = None
    width: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    batch_size: BatchSize = None
    window: int | None = None
    save_stages: bool = False
    changes: Changes = field(default_factory=Changes)
    language: bool = False
    long_prompts: str = "cut"
    default_style: str | None = None
    regions: Regions = field(default_factory=Regions)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    low_memory: bool = False
    adapted: Callable[[float], Sequence[StageSlot]] | None = None

    def conduct(self, **more: Any) -> Conduct:
        """The engine's settings. more: further fields of `Conduct`."""
        return Conduct(self.batch_size, keep_stages=self.save_stages, **more)


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt with everything resolved: the stages in `slots`, their sizes and their settings.

    edit: the picture to change. changes: the recipe's entries for it, the language and the regions. masks, conditions:
    see `Task`.
    """

    record: PromptRecord
    negative_prompt: str
    num_images: int
    slots: Sequence[StageSlot]
    sizes: Sequence[tuple[int, int]]
    settings: Mapping[str, SamplingConfig]
    edit: Edit | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    conditions: Mapping[str, Value] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The line's own id, or its index."""
        return self.record.id or f"{self.record.index:06d}"

    def targets(self) -> Iterator[Target]:
        """The pictures of the prompt."""
        return (Target(self, number) for number in range(self.num_images))


@dataclass(frozen=True)
class Target:
    """One picture of a run: a job, and the picture's number within it."""

    job: Job
    number: int

    @cached_property
    def recipe(self) -> Recipe:
        """Everything that decides the picture's bytes."""
        job, (height, width) = self.job, self.job.sizes[-1]
        return Recipe(
            prompt=job.record.prompt,
            negative_prompt=job.negative_prompt,
            seed=job.record.seed,
            number=self.number,
            height=height,
            width=width,
            stages={slot.config.name: job.settings[slot.config.name] for slot in job.slots},
            adapters=adapters_in(job.slots),
            conditions=recorded(job.conditions),
            **job.changes,
        )

    def task(self) -> Task:
        """The picture as a task for the engine."""
        recipe, job = self.recipe, self.job
        return Task(
            recipe,
            passes(job.slots, job.sizes, recipe),
            edit=job.edit,
            name=str(job.record.index),
            masks=job.masks,
            conditions=job.conditions,
        )

    @property
    def stem(self) -> str:
        """`000000-a-red-apple`, or `000000-1-a-red-apple` where a prompt has several; ASCII, at most 60."""
        prompt = self.job.record.prompt[: 20 * _NAME_LENGTH]  # the rest cannot show, and may be long
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        number = [str(self.number)] if self.job.num_images > 1 else []
        parts = [f"{self.job.record.index:06d}", *number, *re.findall("[a-z0-9]+", plain)]
        return "-".join(parts)[:_NAME_LENGTH].rstrip("-")


class Planner:
    """Resolves the settings of each prompt of a run."""

    def __init__(self, pipeline: CascadePipeline, options: DrawOptions) -> None:
        """Raises CascadeError for settings of the call itself that this cascade cannot satisfy, whatever the line."""
        self._options = options
        self._styles = pipeline.styles.choose(options.default_style)
        self._configs = [slot.config for slot in pipeline.slots]
        resolve_sampling(self._configs, options.preset, options.sampling)
        self.slots = pipeline.slots_until(options.until)
        self.sizes = stage_sizes([slot.config for slot in self.slots], options.height, options.width)
        self._called = self._resolved(options.changes)
        self._read = [slot.config.conditions for slot in self.slots]
        self._given = given_values(self._read, options.conditions)
        self._last: tuple[dict[str, Any], Change] = ({}, self._called)
        self._adapted: dict[float, Sequence[StageSlot]] = {}

    def job(self, record: PromptRecord) -> Job:
        """The job of a prompt. Raises CascadeError for settings of its own that this cascade cannot satisfy."""
        if not self._options.language:  # a phase or an AND may not end in further words
            record = replace(record, prompt=self._styles.added(record.prompt))
        options, own = self._options, {"steps": record.steps, "guidance": record.guidance, **record.sampling}
        overrides = {**options.sampling, **{name: value for name, value in own.items() if value is not None}}
        settings = resolve_sampling(self._configs, record.preset or options.preset, overrides)
        negative = options.negative_prompt if record.negative_prompt is None else record.negative_prompt
        count = record.num_images or options.num_images
        edit, size, entries = self._changes(record)
        sizes = self.sizes
        if size != sizes[-1]:
            sizes = stage_sizes([slot.config for slot in self.slots], *size)
        parts = options.regions if record.regions is None else regions_of(record.regions)
        entries = {**entries, "language": options.language, "regions": parts.entries}
        entries["long_prompts"] = options.long_prompts
        slots = self._slots(record.adapter_factor)
        values = settled(self._read, {**self._given, **(record.conditions or {})})
        job = Job(record, negative or "", count, slots, sizes, settings, edit, entries, parts.masks, values)
        script_of(Target(job, 0).recipe)  # a mistake in the prompt fails this line alone
        return job

    def _slots(self, factor: float | None) -> Sequence[StageSlot]:
        """The stages, with their adapters' scales times a factor; one object per factor, so that batches are shared."""
        if factor is None or self._options.adapted is None:
            return self.slots
        if factor not in self._adapted:
            self._adapted[factor] = self._options.adapted(factor)[: len(self.slots)]
        return self._adapted[factor]

    def _changes(self, record: PromptRecord) -> Change:
        """The line's changes if it has any, else the call's; a picture that several lines name is read once."""
        every = {name: getattr(record, name) for name in ("image", "mask", "strength")}
        own = {name: value for name, value in every.items() if value is not None}
        own |= {"variation": record.variation, "variation_noise": "all"} if record.variation else {}
        if own != self._last[0]:
            self._last = (own, self._resolved(replace(self._options.changes, **own))) if own else ({}, self._called)
        return self._last[1]

    def _resolved(self, changes: Changes) -> Change:
        asked = self._options.height is not None or self._options.width is not None
        return changes.resolve([slot.config for slot in self.slots], self.sizes[-1], asked)

    def window(self, sizes: BatchSizes) -> int:
        """Number of prompts to draw together: the same in every process, whatever memory each finds free."""
        settings = resolve_sampling(self._configs, self._options.preset, self._options.sampling)
        each = zip(self.slots, self.sizes, strict=True)
        way = [Pass(slot, size, settings[slot.config.name], number=0) for slot, size in each]
        largest = sizes.largest or max(map(sizes.of, way))
        return self._options.window or max(1, largest // self._options.num_images)


def plan(pipeline: CascadePipeline, record: PromptRecord, options: DrawOptions) -> Job:
    """The job of a single prompt; see `Planner.job`."""
    return Planner(pipeline, options).job(record)


def subfolder(index: int, num_images: int) -> str:
    """`0003/` for the pictures of a prompt beyond the first 10,000 files, "" for the first ones.

    It depends on the prompt's index alone, so that neither order nor number of processes moves a picture.
    """
    group = index // max(1, FILES_PER_FOLDER // num_images)
    return f"{group:04d}/" if group else ""
