"""One training step: algorithm 18.1, for any stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cascade.conditioning import Conditioning, Given, TextEmbeddings, TextEncoderProtocol
from cascade.config.data import AugSpread
from cascade.config.training import LogitNormalLevels, LossConfig
from cascade.data.loader import Batch
from cascade.diffusion.loss import Weighting, logit_normal_levels, stratify, uniform_levels
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import downsample
from cascade.seeds import derive_seed, generator
from cascade.stage import NetworkCall, Stage
from cascade.system.transfer import on_device

# --- counted noise ---------------------------------------------------------------------------------------------------
# Counter-based normal noise: each value is a function of a key and its index, so a GPU computes all in parallel.

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Constants of SplitMix64, as signed numbers; sums and products wrap."""
_HALF = 2**32


def counted_noise(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape) in float32, row b a function of keys[b] alone.

    keys: (B,) int64, pseudo-random, on the device of the result. One generator per picture would need one kernel launch
    per picture; this takes about twenty for any B. Results on different GPUs agree up to the last bits of logarithm and
    cosine. Source: SplitMix64 (Steele et al. 2014), each of whose outputs gives two values by Box & Muller (1958).
    """
    count = math.prod(shape)
    places = torch.arange(1, -(-count // 2) + 1, device=keys.device)
    state = _mixed(keys[:, None] + _GOLDEN * places)
    radius = (-2 * (((state >> 32 & _HALF - 1) + 0.5) / _HALF).log()).sqrt()  # at most 6.8
    angle = (state & _HALF - 1) * (2 * math.pi / _HALF)
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, :count].unflatten(1, shape)


def _mixed(state: Tensor) -> Tensor:
    """The last three lines of SplitMix64; int64 >> extends the sign, which the masks remove."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)


# --- step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBatch:
    """Pictures with their text and view numbers.

    x: (B, C, H, W) in [-1, 1]; text: (B, N, D); text_mask: (B, N) bool. samples: (B,) view numbers in the run, which
    determine the noise. positions: (B,) indices in the step of `batch_size`, over all passes and processes.
    lows: (C, h, w) in [-1, 1], by index in x: smaller pictures that are not the area mean. given: other conditions.
    mask: (B, 1, H, W) in [0, 1], 1 where the loss counts; None: everywhere.
    """

    x: Tensor
    text: Tensor
    text_mask: Tensor
    samples: Sequence[int]
    positions: Tensor
    batch_size: int
    lows: Mapping[int, Tensor] = field(default_factory=dict)
    given: Mapping[str, Given] = field(default_factory=dict)
    mask: Tensor | None = None

    def weights(self, loss: LossConfig) -> Tensor | None:
        """Weight of each pixel in the loss, (B, 1, H, W); None: 1."""
        return None if self.mask is None else self.mask + (1 - self.mask) * loss.unmasked_weight


@dataclass(frozen=True)
class Draw:
    """All random numbers of a step. eps: (B, C, H, W); u, aug_level: (B,); aug_eps: shaped like the smaller picture.

    u and aug_level stay on the CPU: log SNR is computed from them in float64, which not every GPU supports.
    """

    u: Tensor
    eps: Tensor
    aug_level: Tensor
    aug_eps: Tensor | None

    def to(self, device: torch.device) -> Draw:
        """The same noise for pictures on another device."""
        aug_eps = None if self.aug_eps is None else on_device(self.aug_eps, device)
        return replace(self, eps=on_device(self.eps, device), aug_eps=aug_eps)


def training_batch(
    batch: Batch,
    text: TextEncoderProtocol,
    device: torch.device,
    first: int,
    batch_size: int,
    pictures: PictureFormat = RGB,
) -> TrainingBatch:
    """A loaded batch on the device, pictures in [-1, 1] and captions as embeddings.

    first: number of the first view of the step of `batch_size`; the batch may be one process' share of one pass.
    pictures: the format of the batch.
    """
    if isinstance(batch.of_captions, TextEmbeddings):
        embeddings = batch.of_captions
    else:
        embeddings = text.encode(batch.captions, batch_size=len(batch.captions))
    return TrainingBatch(
        x=pictures.to_float(on_device(batch.images, device)),
        text=on_device(embeddings.tokens, device).to(torch.float32),
        text_mask=on_device(embeddings.mask, device),
        samples=batch.samples,
        positions=torch.tensor(batch.samples) - first,
        batch_size=batch_size,
        lows={place: pictures.to_float(on_device(low, device)) for place, low in batch.lows.items()},
        given={
            name: Given(on_device(one.value, device), on_device(one.present, device))
            for name, one in batch.given.items()
        },
        mask=_mask(batch, device),
    )


def _mask(batch: Batch, device: torch.device) -> Tensor | None:
    """The masks of a batch, 1 for pictures without one; None if no picture has one."""
    if not batch.masks:
        return None
    mask = torch.full_like(batch.images[:, :1], 255, dtype=torch.uint8)
    for place, own in batch.masks.items():
        mask[place] = own
    return on_device(mask, device).float() / 255


@dataclass(frozen=True)
class NoiseSource:
    """Everything that determines the noise of a view, except its number.

    aug_spread: see `aug_levels`. purpose: separates training from validation. device: where the noise is computed; a
    GPU's noise differs from a CPU's, whose generator would take 10 ns per value.
    """

    seed: int
    max_aug_level: float
    aug_spread: AugSpread = "std"
    purpose: str = "train"
    device: torch.device | None = None

    def aug_levels(self, u: Tensor) -> Tensor:
        """Standard deviations of the noise on smaller pictures, from u (B,) uniform in [0, 1)."""
        return aug_levels(u, self.max_aug_level, self.aug_spread)


def draw_noise(
    samples: Sequence[int], large: tuple[int, ...], small: tuple[int, ...] | None, source: NoiseSource
) -> Draw:
    """The noise of each view, keyed by (seed, view number, purpose): the same in any batch and any process.

    large: (C, H, W) of a picture. small: shape of the noise on the smaller one, see `Stage.noised_shape`.
    """
    if source.device is not None and source.device.type != "cpu":
        return _drawn_there(samples, large, small, source, source.device)
    rngs = [generator(source.seed, sample, source.purpose) for sample in samples]
    uniform = torch.stack([torch.rand(2, generator=rng) for rng in rngs])
    eps = torch.stack([torch.randn(large, generator=rng) for rng in rngs])
    aug_eps = None if small is None else torch.stack([torch.randn(small, generator=rng) for rng in rngs])
    return Draw(uniform[:, 0], eps, source.aug_levels(uniform[:, 1]), aug_eps)


def _drawn_there(
    samples: Sequence[int],
    large: tuple[int, ...],
    small: tuple[int, ...] | None,
    source: NoiseSource,
    device: torch.device,
) -> Draw:
    """`draw_noise` on a GPU: keyed by the views' seeds, below 2^63; u and aug_level are computed from their bits."""
    seeds = torch.tensor([derive_seed(source.seed, sample, source.purpose) for sample in samples])
    keys = on_device(seeds, device)
    u, level = ((seeds >> shift & _UNIT - 1).to(torch.float32) / _UNIT for shift in (0, 24))
    aug_eps = None if small is None else counted_noise(~keys, small)
    return Draw(u, counted_noise(keys, large), source.aug_levels(level), aug_eps)


def aug_levels(u: Tensor, most: float, spread: AugSpread) -> Tensor:
    """Standard deviations in [0, most] of the noise on smaller pictures, from u (B,) uniform in [0, 1).

    spread: `std`, uniform deviations, or `time`, uniform times of the cosine schedule, where the deviation is
    sin(pi t / 2). Source of the second: Saharia et al. (2022) sec. 2.4, aug_level ~ U(0, 1).
    """
    return u * most if spread == "std" else torch.sin(u * math.asin(most))


_UNIT = 1 << 24
"""Number of equal parts of [0, 1) that float32 distinguishes."""


def noise_levels(stage: Stage, loss: LossConfig, u: Tensor) -> Tensor:
    """Log SNR (B, 1, 1, 1) for u (B,) uniform in [0, 1), by the distribution in the settings."""
    if isinstance(loss.levels, LogitNormalLevels):
        return logit_normal_levels(stage.schedule, u, loss.levels.mean, loss.levels.std)
    return uniform_levels(stage.schedule, u)


def conditions(stage: Stage, batch: TrainingBatch, draw: Draw) -> Conditioning:
    """The network's conditions; for super-resolution they include the noised smaller picture (area mean or own)."""
    cond = Conditioning(batch.text, batch.text_mask, given=batch.given)
    if draw.aug_eps is None:
        return cond
    height, width = batch.x.shape[-2:]
    low = downsample(batch.x, (height // stage.scale, width // stage.scale))
    for place, own in batch.lows.items():
        low[place] = own
    return stage.see(cond, low, draw.aug_level, draw.aug_eps)


@dataclass(frozen=True)
class Objective:
    """Algorithm 18.1 with a run's settings: the random numbers of each view, and the loss of its picture."""

    settings: LossConfig
    source: NoiseSource

    def __call__(self, stage: Stage, network: NetworkCall, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Loss of each picture (B,) and the log SNR (B, 1, 1, 1) at which it was taken.

        network: the stage's network, possibly wrapped.
        """
        shape = batch.x.shape[1:]
        draw = draw_noise(batch.samples, shape, stage.noised_shape(shape), self.source).to(batch.x.device)
        return training_loss(stage, network, batch, self.settings, draw)


def training_loss(
    stage: Stage, network: NetworkCall, batch: TrainingBatch, loss: LossConfig, draw: Draw
) -> tuple[Tensor, Tensor]:
    """`Objective` for given random numbers.

    Source: Prince (2023) algorithm 18.1: draw t and eps, diffuse, predict, square.
    """
    u = stratify(draw.u, batch.positions, batch.batch_size) if loss.stratified else draw.u
    log_snr = on_device(noise_levels(stage, loss, u), batch.x.device)
    cond = conditions(stage, batch, draw)
    pixels = batch.weights(loss)
    weighting = Weighting(loss.space, loss.min_snr_gamma, loss.max_weight, loss.variance_weight, pixels=pixels)
    return stage.loss(network, weighting, batch.x, cond, log_snr, draw.eps), log_snr
