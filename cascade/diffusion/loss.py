"""The training loss and the distribution of noise levels. No reduction, no randomness: those are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.config import Kind
from cascade.diffusion.noise import diffuse
from cascade.diffusion.parameterization import log_weight_in_x, target
from cascade.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Weighting:
    """Weight of the square, as a function of log SNR.

    space: the square is that of eps, v, x or velocity. min_snr_gamma: min(SNR, gamma) on the square in x instead
    (Hang et al. 2023). max_weight: cap on the weight in x.
    """

    space: Kind = "eps"
    min_snr_gamma: float | None = None
    max_weight: float | None = None

    def log_in_x(self, log_snr: Tensor) -> Tensor:
        """log of the weight on |x - x_hat|^2."""
        log_weight = log_weight_in_x(self.space, log_snr)
        if self.min_snr_gamma is not None:
            log_weight = log_snr.clamp(max=math.log(self.min_snr_gamma))
        if self.max_weight is not None:
            log_weight = log_weight.clamp(max=math.log(self.max_weight))
        return log_weight

    def on_output(self, kind: Kind, log_snr: Tensor) -> Tensor:
        """The weight on the square of a network's own output of `kind`; exactly 1 where `kind` is `space`."""
        return (self.log_in_x(log_snr) - log_weight_in_x(kind, log_snr)).exp()


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    kind: Kind,
    weighting: Weighting,
    x: Tensor,
    log_snr: Tensor,
    eps: Tensor,
) -> Tensor:
    """Weighted mean square of each picture: (B,).

    network: (z, log_snr) -> output of `kind`. x, eps: (B, C, H, W); log_snr: (B, 1, 1, 1).
    Source: Prince (2023) algorithm 18.1 for kind = space = eps, where the weight is 1. The square is taken in the
    network's own space: in x it would cancel at low noise.
    """
    output = network(diffuse(x, eps, log_snr), log_snr)
    square = (output.float() - target(kind, x, eps, log_snr)).square().mean(dim=(1, 2, 3))
    return weighting.on_output(kind, log_snr).flatten() * square


def uniform_levels(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """Log SNR at uniform time, from u (B,) uniform in [0, 1): (B, 1, 1, 1).

    Discrete: t = k / T with k uniform in 1..T, as algorithm 18.1 draws it; continuous: t = u.
    """
    t = u if schedule.steps is None else ((u * schedule.steps).floor() + 1) / schedule.steps
    return schedule.log_snr(t)[:, None, None, None]


def logit_normal_levels(schedule: NoiseSchedule, u: Tensor, mean: float, std: float) -> Tensor:
    """Log SNR = -2 logit t with logit t ~ N(mean, std), from u (B,): (B, 1, 1, 1), within the schedule's range.

    t is that of the straight path, 1 = noise (Esser et al. 2024, sec. 3.1).
    """
    logit = mean + std * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
    ends = schedule.log_snr(torch.tensor([1.0, 0.0]))
    return (-2 * logit).float().clamp(float(ends[0]), float(ends[1]))[:, None, None, None]


def stratify(u: Tensor, positions: Tensor, batch_size: int) -> Tensor:
    """Spread u over the batch: picture i of n gets (i + u_i) / n. positions: (B,), places in the whole batch."""
    return (positions + u) / batch_size
