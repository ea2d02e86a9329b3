"""The training loss and the distribution of noise levels, without a batch mean; random numbers are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.diffusion.noise import CLEAN, Prediction, diffuse, log_weight_in_x, posterior, target, to_x
from cascade.diffusion.schedules import NoiseSchedule, ReverseStep


@dataclass(frozen=True)
class Weighting:
    """Weight of the squared error, as a function of log SNR.

    space: the quantity whose squared error has weight 1: eps, v, x or velocity. min_snr_gamma: weight min(SNR, gamma)
    on the squared error in x instead (Hang et al. 2023). max_weight: cap on the weight in x. variance: weight of the
    variational bound, for networks that predict their variance; step: the reverse step of the bound, set per batch.
    pixels: (B, 1, H, W), weights of the pixels; None: 1.
    """

    space: Prediction = "eps"
    min_snr_gamma: float | None = None
    max_weight: float | None = None
    variance: float = 0.0
    step: ReverseStep | None = None
    pixels: Tensor | None = None

    def mean(self, terms: Tensor) -> Tensor:
        """The mean of terms (B, C, H, W) over all pixels and channels, each times its pixel's weight: (B,)."""
        return (terms if self.pixels is None else self.pixels * terms).mean(dim=(1, 2, 3))

    def log_in_x(self, log_snr: Tensor) -> Tensor:
        """log of the weight on |x - x_hat|^2."""
        log_weight = log_weight_in_x(self.space, log_snr)
        if self.min_snr_gamma is not None:
            log_weight = log_snr.clamp(max=math.log(self.min_snr_gamma))
        if self.max_weight is not None:
            log_weight = log_weight.clamp(max=math.log(self.max_weight))
        return log_weight

    def on_output(self, kind: Prediction, log_snr: Tensor) -> Tensor:
        """The weight on the squared error of a network's output of `kind`; exactly 1 where `kind` is `space`."""
        return (self.log_in_x(log_snr) - log_weight_in_x(kind, log_snr)).exp()


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    kind: Prediction,
    weighting: Weighting,
    x: Tensor,
    log_snr: Tensor,
    eps: Tensor,
) -> Tensor:
    """Weighted mean square of each picture: (B,).

    network: (z, log_snr) -> output of `kind`; channels beyond those of x hold the place of the log variance in [-1, 1]
    and are trained only by the variational bound of the weighting's `step`. x, eps: (B, C, H, W); log_snr:
    (B, 1, 1, 1). Source: Prince (2023) algorithm 18.1 for kind = space = eps, where the weight is 1. The squared error
    is taken in the network's output space: in x it would cancel at low noise.
    """
    z = diffuse(x, eps, log_snr)
    output, *spread = network(z, log_snr).float().split(x.shape[1], dim=1)
    square = (output - target(kind, x, eps, log_snr)).square()
    loss = weighting.on_output(kind, log_snr).flatten() * weighting.mean(square)
    if spread and weighting.step is not None and weighting.variance:
        x_hat = to_x(kind, output.detach(), z, log_snr)  # the bound must not train the mean
        place = (spread[0] + 1) / 2
        loss = loss + weighting.variance * (
            weighting.mean(_nats(place, x_hat, x, z, log_snr, weighting.step)) / math.log(2)
        )
    return loss


def variational_bits(place: Tensor, x_hat: Tensor, x: Tensor, z: Tensor, log_snr: Tensor, step: ReverseStep) -> Tensor:
    """The variational bound's term of one step, in bits per dimension: (B,).

    place: the log variance on the line from the posterior's (0) to that of beta (1). x_hat, x, z: (B, C, H, W), x in
    [-1, 1] with 256 levels. The term is the KL divergence of the true posterior from the model's; in the step to the
    clean picture, the negative log likelihood of x. Source: Ho et al. (2020) eq. 5 and 13; Nichol & Dhariwal (2021)
    eq. 15 for the variance.
    """
    return _nats(place, x_hat, x, z, log_snr, step).mean(dim=(1, 2, 3)) / math.log(2)


def _nats(place: Tensor, x_hat: Tensor, x: Tensor, z: Tensor, log_snr: Tensor, step: ReverseStep) -> Tensor:
    """The terms of `variational_bits` before the mean, in nats: (B, C, H, W)."""
    true_mean, _ = posterior(x, z, log_snr, step.before)
    mean, _ = posterior(x_hat, z, log_snr, step.before)
    log_variance = torch.lerp(step.small, step.large, place)
    ratio = step.small - log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp())
    return torch.where(step.before >= CLEAN, -log_likelihood(x, mean, log_variance), divergence)


def log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability of the bin of x, one of 256 levels in [-1, 1], under a Gaussian; shaped like x.

    The outermost bins extend to infinity. Source: Ho et al. (2020) eq. 13. Far from the mean, where the cumulative
    distribution rounds to 0 or 1, logarithms of the lower tail are subtracted instead, with the bin mirrored if
    necessary: accurate in float32 at any distance, with a gradient.
    """
    scale = (-0.5 * log_variance).exp()
    above = torch.where(x > 0.999, _EDGE, (x - mean + 1 / 255) * scale)
    below = torch.where(x < -0.999, -_EDGE, (x - mean - 1 / 255) * scale)
    mirrored = above + below > 0
    above, below = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    around = torch.special.ndtr(above) - torch.special.ndtr(below)  # for a bin at or next to the mean
    log_above, log_below = (_log_lower_tail(end.clamp(max=0)) for end in (above, below))
    beyond = log_above + torch.log(-torch.expm1((log_below - log_above).clamp(max=-_LEAST)))
    return torch.where(above > 0, around.clamp(min=_LEAST).log(), beyond)


_EDGE = 1e4
"""Standard deviations used in place of infinity, whose gradient would be NaN."""
_LEAST = 1e-12


def _log_lower_tail(x: Tensor) -> Tensor:
    """Log of the standard normal cumulative distribution at x <= 0. torch's `log_ndtr` is missing on MPS."""
    return torch.special.erfcx(-x / math.sqrt(2)).log() - math.log(2) - x.square() / 2


def uniform_levels(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """Log SNR at uniform time, from u (B,) uniform in [0, 1): (B, 1, 1, 1).

    Discrete: t = k / T with k uniform in 1..T, as in algorithm 18.1; continuous: t = u.
    """
    t = u if schedule.steps is None else ((u * schedule.steps).floor() + 1) / schedule.steps
    return schedule.log_snr(t)[:, None, None, None]


def logit_normal_levels(schedule: NoiseSchedule, u: Tensor, mean: float, std: float) -> Tensor:
    """Log SNR = -2 logit t with logit t ~ N(mean, std), from u (B,): (B, 1, 1, 1), within the schedule's range.

    t is the time of the straight path, 1 = noise (Esser et al. 2024, sec. 3.1).
    """
    logit = mean + std * torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6))
    ends = schedule.log_snr(torch.tensor([1.0, 0.0]))
    return (-2 * logit).float().clamp(float(ends[0]), float(ends[1]))[:, None, None, None]


def stratify(u: Tensor, positions: Tensor, batch_size: int) -> Tensor:
    """Spread u over the batch: picture i of n gets (i + u_i) / n. positions: (B,), places in the whole batch."""
    return (positions + u) / batch_size
