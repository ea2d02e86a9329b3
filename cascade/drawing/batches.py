"""Drawing one batch of pictures with one stage: noise from named generators, conditions, the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.conditioning import Conditioning, Given, TextEmbeddings
from cascade.config.sampling import SamplingConfig
from cascade.diffusion.editing import Known
from cascade.diffusion.guidance import Act, Part, within
from cascade.diffusion.noise import NoiseBetween, NoiseSource, noise_like
from cascade.diffusion.samplers import OnStep
from cascade.pictures.images import back_project, flatten
from cascade.seeds import generator
from cascade.stage import Stage
from cascade.system.transfer import on_device


@dataclass(frozen=True)
class Picture:
    """One picture to draw: the row of its text, and (seed, number), which determine all its noise.

    other: another seed, and a share in [0, 1]: the initial noise (everywhere: all noise) lies this far on the way to
    that seed's noise.
    """

    text: int
    seed: int
    number: int
    other: tuple[int, float] | None = None
    everywhere: bool = False


@dataclass(frozen=True)
class Spoken:
    """One prompt of each picture in a batch: embeddings with a row each, weights, and regions.

    weight: (B, 1, 1, 1), or (B, 1, h, w). region: (B, 1, h, w), None for a prompt of the whole picture.
    """

    text: TextEmbeddings
    weight: Tensor
    region: Tensor | None = None


@dataclass(frozen=True)
class Texts:
    """Embeddings, one row for each `Picture.text`: of the prompts, and of their negative prompts or the null text.

    scenes: instead, (share of the steps, prompts, negative prompts) of each phase.
    """

    own: TextEmbeddings
    null: TextEmbeddings
    scenes: Sequence[tuple[float, Sequence[Spoken], Sequence[Spoken]]] = ()


@dataclass(frozen=True)
class Inputs:
    """The inputs of one batch of one stage.

    size: height and width. low: (B, C, h, w), the smaller pictures as stored; None for a base stage. known: pictures to
    start from, and their pixels that must stay. given: the stage's conditions, a row for each picture.
    """

    settings: SamplingConfig
    size: tuple[int, int]
    pictures: Sequence[Picture]
    texts: Texts
    low: Tensor | None = None
    known: Known | None = None
    given: Mapping[str, Given] = field(default_factory=dict)


def draw_batch(
    stage: Stage, inputs: Inputs, on_step: OnStep | None = None, device: torch.device | None = None
) -> Tensor:
    """Draw one batch with one stage: (B, C, H, W) float32, in about [-1, 1].

    device: device to compute on, default the weights' own; weights that are read layer by layer have none.
    """
    device, settings, low, form = device or stage.device, inputs.settings, inputs.low, stage.config.pictures
    rows = [picture.text for picture in inputs.pictures]
    own, null = inputs.texts.own.select(rows), inputs.texts.null.select(rows)
    cond = Conditioning(own.tokens, own.mask, given=inputs.given)
    if low is not None:
        cond = _with_smaller(stage, cond, inputs, form.to_float(low))
    cond = cond.to(device)
    null_cond = cond.without().with_text(on_device(null.tokens, device), on_device(null.mask, device))
    known = None if inputs.known is None else inputs.known.to(device)
    z = _start(stage, inputs, device)
    drawing = stage.knowing(known).following(_acts(inputs.texts, cond, z))
    x = drawing.sample(cond, null_cond, z, _rng(stage.name, inputs.pictures, "step"), settings, on_step)
    x = flatten(x, settings.flatten)
    x = x if low is None else back_project(x, form.to_float(on_device(low, x.device)), settings.consistency)
    return x if known is None or known.mask is None else torch.lerp(known.x, x, known.mask)


def _acts(texts: Texts, cond: Conditioning, eps: Tensor) -> list[Act[Conditioning]]:
    """The scenes of a batch as conditions. eps: (B, C, H, W), noise around regions."""
    device = cond.text.device

    def part(spoken: Spoken, cond: Conditioning) -> Part[Conditioning]:
        text = cond.with_text(on_device(spoken.text.tokens, device), on_device(spoken.text.mask, device))
        weight = on_device(spoken.weight, device)
        if spoken.region is None or cond.low_res is not None:  # a smaller picture already has everything in its place
            return Part(text, weight)
        region = on_device(spoken.region, device)
        return Part(text, weight, lambda denoise: within(denoise, region, eps))

    without = cond.without()
    return [
        Act(start, [part(one, cond) for one in own], [part(one, without) for one in null])
        for start, own, null in texts.scenes
    ]


def _rng(stage: str, pictures: Sequence[Picture], purpose: str) -> list[NoiseSource]:
    return [_source(stage, picture, purpose) for picture in pictures]


def _source(stage: str, picture: Picture, purpose: str) -> NoiseSource:
    own = generator(picture.seed, picture.number, stage, purpose)
    if picture.other is None or not picture.everywhere:
        return own
    seed, share = picture.other
    return NoiseBetween(own, generator(seed, picture.number, stage, purpose), share)


def _with_smaller(stage: Stage, cond: Conditioning, inputs: Inputs, low: Tensor) -> Conditioning:
    """The conditions with the smaller pictures (B, C, h, w) in [-1, 1], noised."""
    noised = stage.noised_shape((stage.config.pictures.channels, *inputs.size))
    assert noised is not None, "a base stage sees no smaller picture"
    rng = _rng(stage.name, inputs.pictures, "augment")
    eps = noise_like(torch.empty(len(low), *noised), rng)
    return stage.see(cond, low, torch.full((len(low),), inputs.settings.aug_level), eps)


def _start(stage: Stage, inputs: Inputs, device: torch.device) -> Tensor:
    """The initial noise of the pictures: (B, C, H, W).

    Noise between two seeds lies on the arc of the sphere between them, so that its variance stays 1 (slerp, Shoemake
    1985, for vectors that are nearly orthogonal).
    """
    shape = torch.empty(len(inputs.pictures), stage.config.pictures.channels, *inputs.size, device=device)
    z = noise_like(shape, _rng(stage.name, inputs.pictures, "start"))
    for row, picture in enumerate(inputs.pictures):
        if picture.other is not None and not picture.everywhere:
            seed, share = picture.other
            there = noise_like(shape[:1], [generator(seed, picture.number, stage.name, "start")])[0]
            angle = share * math.pi / 2
            z[row] = math.cos(angle) * z[row] + math.sin(angle) * there
    return z
