"""Drawing one batch of pictures with one stage: noise from named generators, conditions, the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config import SamplingConfig
from cascade.diffusion.noise import noise_like
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
    device: torch.device | None = None,
) -> Tensor:
    """One batch of one stage: (B, C, H, W) float32, in about [-1, 1].

    size: height and width. low: (B, C, h, w) uint8, the smaller pictures; None for a base stage. device: where to
    compute, default where the weights lie; those read layer by layer lie nowhere.
    """
    device, shape = device or stage.device, (stage.config.channels, *size)

    def rng(purpose: str) -> list[torch.Generator]:
        return [generator(picture.seed, picture.number, stage.name, purpose) for picture in batch]

    rows = [picture.text for picture in batch]
    own, null = texts.own.select(rows), texts.null.select(rows)
    cond = Conditioning(own.tokens, own.mask)
    if low is not None:
        noised = stage.noised_shape(shape)
        assert noised is not None, "a base stage sees no smaller picture"
        eps = noise_like(torch.empty(len(batch), *noised), rng("augment"))
        cond = stage.see(cond, to_float(low), torch.full((len(batch),), settings.aug_level), eps)
    cond = cond.to(device)
    null_cond = cond.with_text(on_device(null.tokens, device), on_device(null.mask, device))
    z = noise_like(torch.empty(len(batch), *shape, device=device), rng("start"))
    x = flatten(stage.sample(cond, null_cond, z, rng("step"), settings, on_step), settings.flatten)
    return x if low is None else back_project(x, to_float(on_device(low, x.device)), settings.consistency)
