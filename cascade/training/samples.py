"""Grids of sample pictures during training: fixed prompts and seeds, so that grids of two steps can be compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from PIL import Image
from torch import Tensor

from cascade.conditions import NONE, Value
from cascade.config.data import DataConfig
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.data.loader import Batch, Views, batches
from cascade.diffusion.samplers import OnStep
from cascade.drawing.engine import Conduct, Engine
from cascade.drawing.recipe import Recipe
from cascade.drawing.task import Pass, Result, Task, Undrawn, enlarging, with_conditions
from cascade.images import contact_sheet, downsample
from cascade.rasters import shown
from cascade.slots import StageSlot
from cascade.stage import Stage
from cascade.text.embeddings import TextEncoderProtocol

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
