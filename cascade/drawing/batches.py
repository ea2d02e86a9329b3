"""Drawing one batch of pictures with one stage: noise from named generators, conditions, the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config import SamplingConfig
from cascade.diffusion.noise import diffuse, log_snr_from_std, noise_like
from cascade.diffusion.samplers import OnStep
from cascade.images import back_project, flatten, to_float
from cascade.seeds import generator
from cascade.stage import Stage
from cascade.text.embeddings import TextEmbeddings
from cascade.transfer import on_device


@dataclass(frozen=True)
class Picture:
    """One picture to draw: which text it has, and (seed, number), from which all its noise follows."""

    text: int
    seed: int
    number: int


@dataclass(frozen=True)
class Texts:
    """Embeddings, a row for each `Picture.text`: of the prompts, and of what takes the null text's place for each."""

    own: TextEmbeddings
    null: TextEmbeddings


def draw_batch(
    stage: Stage,
    settings: SamplingConfig,
    size: tuple[int, int],
    batch: Sequence[Picture],
    texts: Texts,
    low: Tensor | None,
    on_step: OnStep | None = None,
    tile: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """One batch of one stage: (B, 3, H, W) float32, in about [-1, 1].

    size: height and width. low: (B, 3, h, w) uint8, the smaller pictures; None for a base stage. tile: see
    `Stage.sample`. device: where to compute, default where the weights lie; those read layer by layer lie nowhere.
    """
    device = device or stage.device

    def rng(purpose: str) -> list[torch.Generator]:
        return [generator(picture.seed, picture.number, stage.name, purpose) for picture in batch]

    rows = [picture.text for picture in batch]
    own, null = texts.own.select(rows), texts.null.select(rows)
    cond = Conditioning(own.tokens, own.mask)
    if low is not None:
        cond = _with_smaller(cond, stage.unnoised(to_float(low)), settings.aug_level, rng("augment"))
    cond = cond.to(device)
    null_cond = cond.with_text(on_device(null.tokens, device), on_device(null.mask, device))
    z = noise_like(torch.empty(len(batch), 3, *size, device=device), rng("start"))
    x = flatten(stage.sample(cond, null_cond, z, rng("step"), settings, on_step, tile), settings.flatten)
    return x if low is None else back_project(x, to_float(on_device(low, x.device)), settings.consistency)


def _with_smaller(cond: Conditioning, low: Tensor, aug_level: float, rng: Sequence[torch.Generator]) -> Conditioning:
    """The conditions with the smaller picture (B, 3, h, w), noised."""
    level = log_snr_from_std(torch.full((len(cond), 1, 1, 1), aug_level))
    return Conditioning(cond.text, cond.text_mask, diffuse(low, noise_like(low, rng), level), level)
