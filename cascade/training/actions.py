"""Periodic actions of a training run: log entry, validation, sample grid."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEncoderProtocol
from cascade.conditions.settings import NONE, Value
from cascade.config.data import DataConfig
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig, ValidationConfig
from cascade.data.loader import Batch, Portion, Views, batches
from cascade.diffusion.samplers import OnStep
from cascade.drawing.engine import Conduct, Engine
from cascade.drawing.recipe import Recipe
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import Pass, Result, Task, Undrawn, enlarging, with_conditions
from cascade.files.atomic import atomic_file
from cascade.pictures.images import contact_sheet, downsample
from cascade.pictures.rasters import shown
from cascade.stage import Stage
from cascade.system.process import Stopped
from cascade.training.accelerator import any_process, from_main
from cascade.training.distill import Distillation
from cascade.training.log import Meter, flatten
from cascade.training.step import NoiseSource, Objective, training_batch

if TYPE_CHECKING:
    from accelerate import Accelerator


# --- samples ---------------------------------------------------------------------------------------------------------
# Grids of sample pictures during training: fixed prompts and seeds, so that grids of two steps can be compared.

logger = logging.getLogger("cascade.training")
_CELL = 256


class SampleGrid:
    """The sheet of a run, drawn repeatedly."""

    def __init__(self, config: TrainConfig, text: TextEncoderProtocol) -> None:
        self._config, self._text = config, text
        self._first = cache(lambda: first_views(config))  # once for all grids: a large folder takes long to list
        self._values = cache(lambda: first_values(config))

    def drawn(self, stage: Stage, on_step: OnStep | None = None) -> Image.Image:
        """Pictures for `training.sample_prompts`; for super-resolution input, output and truth next to each other.

        on_step: called after each of the sampler's steps, and may raise.
        """
        config = self._config
        if stage.config.conditions:
            return self._with_conditions(stage, on_step)
        if stage.config.low_resolution is None:
            prompts = config.training.sample_prompts or self._first().captions
            return _base_grid(config, stage, self._text, prompts, on_step)
        return _super_resolution_grid(config, stage, self._text, self._first(), on_step)

    def _with_conditions(self, stage: Stage, on_step: OnStep | None) -> Image.Image:
        """The same with the conditions of the first views."""
        config, values = self._config, self._values()
        if stage.config.low_resolution is not None:
            return _super_resolution_grid(config, stage, self._text, self._first(), on_step, values)
        prompts = config.training.sample_prompts or self._first().captions
        each = [prompts[number % len(prompts)] for number in range(len(values))]
        return _base_grid(config, stage, self._text, each, on_step, values)


def first_views(config: TrainConfig) -> Batch:
    """The first views of the held-out pictures, or else of the run; as many as `training.sample_count`.

    No caption or condition is dropped.
    """
    data, stage = _undropped(config)
    return next(iter(batches(data, stage, config.training.seed, batch_size=config.training.sample_count)))


def first_values(config: TrainConfig) -> list[Mapping[str, Value]]:
    """The conditions of `first_views`."""
    data, stage = _undropped(config)
    views = Views(data, stage, config.training.seed, config.training.sample_count)
    return [views[number].values for number in range(config.training.sample_count)]


def _undropped(config: TrainConfig) -> tuple[DataConfig, StageConfig]:
    held_out = config.training.validation
    sources = held_out.sources if held_out else config.data.sources
    changes = {"sources": sources, "workers": 0, "caption_dropout": 0.0, "joint_dropout": 0.0}
    return config.data.model_copy(update=changes), config.stage.undropped()


def _as_given(values: Mapping[str, Value]) -> dict[str, object]:
    """Values of a record as a caller gives them; those that it lacks are left open."""
    return {name: NONE if value is None else value for name, value in values.items()}


def _label(prompt: str, values: Mapping[str, Value] | None) -> str:
    """A caption, and the conditions that fit into a line."""
    shown = [f"{name} {one}" for name, one in (values or {}).items() if isinstance(one, (str, float))]
    return ", ".join([*([prompt] if prompt else []), *shown])


def _base_grid(
    config: TrainConfig,
    stage: Stage,
    text: TextEncoderProtocol,
    prompts: Sequence[str],
    on_step: OnStep | None,
    values: Sequence[Mapping[str, Value]] | None = None,
) -> Image.Image:
    side, settings = stage.config.resolution, stage.config.sampling
    slot = StageSlot.holding(stage)
    tasks = []
    for number, prompt in enumerate(prompts):
        recipe = Recipe(
            prompt=prompt,
            negative_prompt="",
            seed=config.training.seed,
            number=number,
            height=side,
            width=side,
            stages={stage.name: settings},
        )
        task = Task(recipe, [Pass(slot, (side, side), settings, number)])
        tasks.append(with_conditions(task, _as_given(values[number])) if values else task)
    pictures = _drawn(stage, text, tasks, on_step)
    labels = [_label(task.recipe.prompt, task.conditions) for task in tasks]
    return contact_sheet(pictures, columns=min(8, len(prompts)), labels=labels, cell=max(96, side))


def _super_resolution_grid(
    config: TrainConfig,
    stage: Stage,
    text: TextEncoderProtocol,
    first: Batch,
    on_step: OnStep | None,
    values: Sequence[Mapping[str, Value]] | None = None,
) -> Image.Image:
    slot, settings = StageSlot.holding(stage), stage.config.sampling
    lows = _smaller(stage, first)
    tasks = [
        enlarging(slot, low, caption, settings, config.training.seed, number)
        for number, (low, caption) in enumerate(zip(lows, first.captions, strict=True))
    ]
    if values:
        tasks = [with_conditions(task, _as_given(own)) for task, own in zip(tasks, values, strict=True)]
    pictures = _drawn(stage, text, tasks, on_step)
    form = stage.config.pictures
    small, true = ([shown(picture, form) for picture in each] for each in (lows, first.images))
    cells = [image for trio in zip(small, pictures, true, strict=True) for image in trio]
    labels = [label for caption in first.captions for label in ("low", caption, "truth")]
    return contact_sheet([_enlarged(cell) for cell in cells], columns=6, labels=labels, cell=_CELL)


def _smaller(stage: Stage, first: Batch) -> Tensor:
    """(B, C, h, w) as stored: the smaller pictures of views, the record's own or area means."""
    height, width = (side // stage.scale for side in first.images.shape[-2:])
    form = stage.config.pictures
    lows = form.from_float(downsample(form.to_float(first.images), (height, width)))
    for place, low in first.lows.items():
        lows[place] = low
    return lows


def _drawn(stage: Stage, text: TextEncoderProtocol, tasks: Sequence[Task], on_step: OnStep | None) -> list[Image.Image]:
    """Pictures drawn by the stage, as in generation; white where its output is not finite."""
    conduct = Conduct(len(tasks), on_step=None if on_step is None else lambda step: on_step(step.step, step.x_hat))
    was_training = stage.network.training
    stage.network.eval()
    try:
        results = {result.task: result for result in Engine(text.encode, stage.device, conduct).draw(tasks)}
    finally:
        stage.network.train(was_training)
    return [_image(results[task]) for task in tasks]


def _image(result: Result) -> Image.Image:
    if isinstance(result, Undrawn):
        logger.warning("sample grid: %s", result.reason)
        return Image.new("RGB", (result.task.recipe.width, result.task.recipe.height), "white")
    return shown(result.pixels[-1], result.task.passes[-1].slot.config.pictures)


def _enlarged(image: Image.Image) -> Image.Image:
    """The picture enlarged by repeating pixels, so that the sheet shows single pixels."""
    factor = max(_CELL // max(image.size), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


# --- validation ------------------------------------------------------------------------------------------------------
# The loss on held-out pictures, with the same views, noise and noise levels each time: only the weights differ.

SEED = 0
"""Seed of views and noise; not the run's, so that runs with different seeds can be compared."""


class Validation:
    """The held-out views of one process, and their losses."""

    def __init__(
        self,
        config: TrainConfig,
        settings: ValidationConfig,
        process: int = 0,
        processes: int = 1,
        objective: Objective | Distillation | None = None,
    ) -> None:
        """Read the views, which are the same each time, and keep them in memory. objective: the run's own, if not
        algorithm 18.1.

        Mistakes thus show before the first step, and a large folder is listed once. A batch of uint8 pictures is small
        compared with the activations of its pass. Raises CascadeError when they cannot be read.
        """
        self._stage_config = config.stage.undropped()
        # Pictures are unchanged: nothing is dropped, mirrored or moved. Crops, if any, are the same each time.
        unchanged = {"sources": settings.sources, "caption_dropout": 0.0, "flip": 0.0, "jitter": 0.0, "workers": 0}
        self._data = config.data.model_copy(update=unchanged | {"joint_dropout": 0.0})
        # Noise levels spread evenly over all views have the least variance for this number of views.
        loss = config.training.loss.model_copy(update={"stratified": True})
        source = NoiseSource(SEED, self._data.max_aug_level, self._data.aug_spread, "validation")
        self.objective = replace(objective or Objective(loss, source), settings=loss, source=source)
        self._pass_size = config.training.batch_size // config.training.accumulation
        self._process, self._processes = process, processes
        with closing(self._views()) as views:
            # The same views for any number of passes per step, so that the losses can be compared.
            self._batches = list(islice(views, settings.batches * config.training.accumulation))

    @torch.inference_mode()
    def losses(
        self,
        stage: Stage,
        text: TextEncoderProtocol,
        device: torch.device,
        before_batch: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and log SNR of each view of this process, both (batches * share,), on `device`.

        before_batch: called by every process, and may raise.
        """
        losses, levels = [], []
        total = len(self._batches) * self._pass_size
        for batch in self._batches:
            before_batch()
            ready = training_batch(batch, text, device, 0, total, self._stage_config.pictures)
            loss, level = self.objective(stage, stage.network, ready)
            losses.append(loss.float())
            levels.append(level.flatten())
        return torch.cat(losses), torch.cat(levels)

    def _views(self) -> Generator[Batch, None, None]:
        portion = Portion(self._process, self._processes)
        return batches(self._data, self._stage_config, SEED, batch_size=self._pass_size, portion=portion)


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """The state after a completed step.

    averaged: returns the stage with the averaged weights. stopped: whether the run was asked to stop.
    """

    step: int
    averaged: Callable[[], Stage]
    stopped: Callable[[], bool]


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an action with period `every` is due after a step of a run of `steps`; it also is after the last."""
    return every > 0 and (step % every == 0 or step == steps)


class Action(ABC):
    """An action performed every `every` steps and after the last one; 0: never.

    lengthy: it may take so long that a run that is asked to stop leaves it to the resumed run.
    """

    lengthy = False

    def __init__(self, every: int) -> None:
        self._every = every

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the action is due after a step of a run of `steps`."""
        return is_due(self._every, step, steps)

    @abstractmethod
    def run(self, moment: Moment) -> Mapping[str, float]:
        """Perform the action, in all processes together; returns values for the log entry. Raises Stopped."""


class LogEntry(Action):
    """The means over the steps since the last entry."""

    def __init__(self, every: int, means: Callable[[int], Mapping[str, float]]) -> None:
        """means: returns the means since its last call."""
        super().__init__(every)
        self._means = means

    def run(self, moment: Moment) -> Mapping[str, float]:
        """The means."""
        return self._means(moment.step)


class Validate(Action):
    """The loss on held-out pictures."""

    lengthy = True

    def __init__(self, every: int, validation: Validation, text: TextEncoderProtocol, accelerator: Accelerator) -> None:
        super().__init__(every)
        self.validation, self._text, self._accelerator = validation, text, accelerator

    def run(self, moment: Moment) -> Mapping[str, float]:
        """The mean loss over the pictures of all processes, and by noise level."""

        def leave_if_asked() -> None:
            if any_process(self._accelerator, moment.stopped()):
                raise Stopped

        averaged = moment.averaged()
        with self._accelerator.autocast():
            pairs = self.validation.losses(averaged, self._text, self._accelerator.device, leave_if_asked)
        gathered = self._accelerator.gather(torch.stack(pairs, dim=1))
        meter = Meter()
        meter.add_losses(flatten(gathered[:, 0]), flatten(gathered[:, 1]))
        return {f"validation_{name}": value for name, value in meter.means().items()}


class Grid(Action):
    """A sheet of pictures drawn by the stage, samples/step-N.png."""

    lengthy = True

    def __init__(self, every: int, grid: SampleGrid, folder: Path, accelerator: Accelerator) -> None:
        super().__init__(every)
        self._grid, self._folder, self._accelerator = grid, folder, accelerator

    def run(self, moment: Moment) -> Mapping[str, float]:
        """Draw on the main process. Raises Stopped in every process when asked to stop in the meantime."""
        averaged = moment.averaged()

        def leave_if_asked(*_: object) -> None:
            if moment.stopped():
                raise Stopped

        def draw() -> bool:
            try:
                with self._accelerator.autocast():
                    sheet = self._grid.drawn(averaged, leave_if_asked)
            except Stopped:
                return False
            with atomic_file(self._folder / f"step-{moment.step:08d}.png") as temporary:
                sheet.save(temporary, format="PNG")
            return True

        if not from_main(self._accelerator, draw):
            raise Stopped
        return {}
