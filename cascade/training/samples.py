"""Grids of sample pictures during training: fixed prompts and seeds, so that grids of two steps can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config import TrainConfig
from cascade.data.loader import Batch, batches
from cascade.diffusion.noise import noise_like
from cascade.diffusion.samplers import OnStep
from cascade.images import contact_sheet, to_float, to_pil
from cascade.seeds import generator
from cascade.stage import Stage
from cascade.text.embeddings import TextEncoderProtocol
from cascade.training.step import NoiseSource, TrainingBatch, conditions, draw_noise
from cascade.transfer import on_device

_CELL = 256


def sample_grid(
    config: TrainConfig,
    stage: Stage,
    text: TextEncoderProtocol,
    first: Callable[[], Batch] | None = None,
    on_step: OnStep | None = None,
) -> Image.Image:
    """Pictures for `training.sample_prompts`; for super-resolution low input, output and truth side by side.

    first: gives the first views where they are shown, by default by reading them. on_step: called after each of the
    sampler's steps, and may raise.
    """
    first = first or (lambda: first_views(config))
    if stage.config.low_resolution is None:
        return _base_grid(config, stage, text, config.training.sample_prompts or first().captions, on_step)
    return _super_resolution_grid(config, stage, text, first(), on_step)


def first_views(config: TrainConfig) -> Batch:
    """The first views of the run, as many as `training.sample_count`; no caption is dropped."""
    data = config.data.model_copy(update={"workers": 0, "caption_dropout": 0.0})
    return next(iter(batches(data, config.stage, config.training.seed, batch_size=config.training.sample_count)))


@torch.inference_mode()
def _base_grid(
    config: TrainConfig, stage: Stage, text: TextEncoderProtocol, prompts: Sequence[str], on_step: OnStep | None
) -> Image.Image:
    cond = _text_only(text, prompts, stage.device)
    null = _text_only(text, [""] * len(prompts), stage.device)
    size = (stage.config.resolution, stage.config.resolution)
    pictures = _drawn(stage, cond, null, size, config.training.seed, on_step)
    return contact_sheet(to_pil(pictures), columns=min(8, len(prompts)), labels=prompts, cell=max(96, size[0]))


@torch.inference_mode()
def _super_resolution_grid(
    config: TrainConfig, stage: Stage, text: TextEncoderProtocol, first: Batch, on_step: OnStep | None
) -> Image.Image:
    images, captions = first.images, first.captions
    truth = to_float(on_device(images, stage.device))
    height, width = truth.shape[-2:]
    samples = list(range(len(captions)))
    cond = _text_only(text, captions, stage.device)
    lows = {place: to_float(on_device(low, stage.device)) for place, low in first.lows.items()}
    batch = TrainingBatch(truth, cond.text, cond.text_mask, samples, torch.arange(len(samples)), len(samples), lows)
    noised = stage.noised_size((height, width))
    draw = draw_noise(samples, (height, width), noised, NoiseSource(config.training.seed, 1.0)).to(stage.device)
    level = torch.full_like(draw.aug_level, stage.config.sampling.aug_level)
    cond = conditions(stage, batch, replace(draw, aug_level=level))
    null = _text_only(text, [""] * len(captions), stage.device)
    null = cond.with_text(null.text, null.text_mask)
    pictures = _drawn(stage, cond, null, (height, width), config.training.seed, on_step)
    assert cond.low_res is not None, "a super-resolution stage has a smaller picture"
    rows = [to_pil(cond.low_res), to_pil(pictures), to_pil(truth)]
    cells = [image for trio in zip(*rows, strict=True) for image in trio]
    labels = [label for caption in captions for label in ("low", caption, "truth")]
    return contact_sheet([_enlarged(cell) for cell in cells], columns=6, labels=labels, cell=_CELL)


def _drawn(
    stage: Stage, cond: Conditioning, null: Conditioning, size: tuple[int, int], seed: int, on_step: OnStep | None
) -> Tensor:
    was_training = stage.network.training
    stage.network.eval()
    try:
        rng = [generator(seed, index, stage.name, "sample grid") for index in range(len(cond))]
        z = noise_like(torch.empty(len(cond), 3, *size, device=stage.device), rng)
        return stage.sample(cond, null, z, rng, on_step=on_step)
    finally:
        stage.network.train(was_training)


def _text_only(text: TextEncoderProtocol, prompts: Sequence[str], device: torch.device) -> Conditioning:
    embeddings = text.encode(prompts)
    return Conditioning(embeddings.tokens, embeddings.mask).to(device, torch.float32)


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarged by repeating pixels, so that the sheet shows pixels and not a resize."""
    factor = max(_CELL // max(image.size), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
