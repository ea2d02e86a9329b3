"""Sampling with known pixels: pixels outside a mask are kept, and a noised picture replaces noise as the start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cascade.diffusion.denoisers import with_changed
from cascade.diffusion.noise import (
    CLEAN,
    Denoiser,
    Estimate,
    alpha,
    diffuse,
    noise_like,
    posterior,
    step_beta,
    x_of,
)
from cascade.diffusion.samplers import Generators, OnStep
from cascade.diffusion.schedules import NoiseSchedule
from cascade.system.transfer import on_device


@dataclass(frozen=True)
class Known:
    """Known pixels of a batch of pictures that is to be edited.

    x: (B, C, H, W) in [-1, 1]. mask: (B, 1, H, W) in [0, 1], 1 where the picture is redrawn, 0 where x is kept; None:
    all of it is redrawn. strength: in [0, 1], the time t whose noise is added to x at the start; 1: pure noise, so that
    x is ignored where the picture is redrawn. rounds: see `sample_repaint`; 1: the stage's own sampler. clean: the
    network sees the known pixels without noise, see `see_known`; default: at the noise level of each step.
    """

    x: Tensor
    mask: Tensor | None = None
    strength: float = 1.0
    rounds: int = 1
    clean: bool = False

    def to(self, device: torch.device) -> Known:
        """The same pixels on another device."""
        mask = None if self.mask is None else on_device(self.mask, device)
        return replace(self, x=on_device(self.x, device), mask=mask)


def keep_known(denoise: Denoiser, x: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser with x_hat replaced by the known picture x where the mask is 0.

    Any sampler then sets the known pixels at every step at their noise level: DDIM's step keeps the noise that they
    started with, DDPM's draws them from q(z_s | z_t, x).
    """
    return with_changed(denoise, lambda x_hat: torch.lerp(x, x_hat, mask))


def see_known(denoise: Denoiser, x: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser that sees the known picture x, without noise, where the mask is below 1/2.

    Whatever a sampler makes of these pixels is thus replaced before the next call. x: as the process diffuses it.
    Source: `IFInpaintingPipeline` of diffusers, which draws with DeepFloyd IF in this way. It suits a network that has
    learned to continue clean pixels; others take them for a picture that is nearly finished.
    """
    redrawn = is_redrawn(mask)

    def seeing(z: Tensor, log_snr: Tensor) -> Estimate:
        return denoise(torch.where(redrawn, z, x.to(z.dtype)), log_snr)

    return seeing


def is_redrawn(mask: Tensor) -> Tensor:
    """The pixels that `see_known` leaves to the sampler: bool, of the mask's shape."""
    return mask >= 0.5


def levels_from(schedule: NoiseSchedule, log_snrs: Tensor, strength: float) -> Tensor:
    """The noise levels of a sampler that starts from a picture with the noise of time t = strength: (n + 1,), n <= N.

    log_snrs: (N + 1,), from pure noise. For a schedule with numbered steps these are the only levels, and the first
    (1 - strength) N are left out. At strength 0 only the last level remains.
    """
    if strength >= 1:
        return log_snrs
    if schedule.steps is not None:
        return log_snrs[round((1 - strength) * (len(log_snrs) - 1)) :]
    if strength <= 0:
        return log_snrs[-1:]
    start = schedule.log_snr(torch.tensor([strength], dtype=torch.float64)).to(log_snrs.dtype).flatten()
    return torch.cat([start, log_snrs[log_snrs > start]])


def start_from(known: Known, x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """z at the first level: eps alone where the picture is redrawn at strength 1, elsewhere x diffused with eps.

    x: the known picture, or its residual, as the process diffuses it. log_snr: (B, 1, 1, 1).
    """
    noised = diffuse(x, eps, log_snr)
    if known.strength < 1:
        return noised
    return eps if known.mask is None else torch.lerp(noised, eps, known.mask)


def sample_repaint(
    denoise: Denoiser, z: Tensor, log_snrs: Tensor, rng: Generators, on_step: OnStep, rounds: int
) -> Tensor:
    """Ancestral sampling in which every step is repeated `rounds` times, with noise added back in between.

    The redrawn pixels can thus adapt to the known ones before the next level; with one round this is `ddpm`.
    denoise: the result of `keep_known`. Source: Lugmayr et al. (2022), RePaint, algorithm 1.
    """
    levels = log_snrs.to(z.device)[:, None, None, None, None].expand(-1, len(z), 1, 1, 1)
    for step, (log_snr_t, log_snr_s) in enumerate(pairwise(levels.unbind())):
        ends = bool(log_snrs[step + 1] >= CLEAN)
        for repetition in range(rounds):
            x_hat = x_of(denoise(z, log_snr_t))
            mean, variance = posterior(x_hat, z, log_snr_t, log_snr_s)
            z = x_hat if ends else mean + variance.sqrt() * noise_like(z, rng)
            if repetition < rounds - 1:
                ratio = alpha(log_snr_t) if ends else alpha(log_snr_t) / alpha(log_snr_s)
                added = 1 - alpha(log_snr_t) if ends else step_beta(log_snr_t, log_snr_s)
                z = ratio.sqrt() * z + added.sqrt() * noise_like(z, rng)
        on_step(step, x_hat)
    return z
