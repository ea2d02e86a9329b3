"""The training loss and the distribution of noise levels. No reduction, no randomness: those are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.diffusion.noise import CLEAN, diffuse, posterior
from cascade.diffusion.parameterization import Kind, log_weight_in_x, target, to_x
from cascade.diffusion.schedules import NoiseSchedule, ReverseStep


@dataclass(frozen=True)
class Weighting:
    """Weight of the square, as a function of log SNR.

    space: the square is that of eps, v, x or velocity. min_snr_gamma: min(SNR, gamma) on the square in x instead
    (Hang et al. 2023). max_weight: cap on the weight in x. variance: weight of the variational bound, for networks
    that predict their variance; step: what its bound is of, which each batch brings.
    """

    space: Kind = "eps"
    min_snr_gamma: float | None = None
    max_weight: float | None = None
    variance: float = 0.0
    step: ReverseStep | None = None

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

    network: (z, log_snr) -> output of `kind`; channels beyond those of x say in [-1, 1] where the variance lies, and
    are trained by the variational bound of the weighting's `step` alone. x, eps: (B, C, H, W); log_snr: (B, 1, 1, 1).
    Source: Prince (2023) algorithm 18.1 for kind = space = eps, where the weight is 1. The square is taken in the
    network's own space: in x it would cancel at low noise.
    """
    z = diffuse(x, eps, log_snr)
    output, *spread = network(z, log_snr).float().split(x.shape[1], dim=1)
    square = (output - target(kind, x, eps, log_snr)).square().mean(dim=(1, 2, 3))
    loss = weighting.on_output(kind, log_snr).flatten() * square
    if spread and weighting.step is not None and weighting.variance:
        x_hat = to_x(kind, output.detach(), z, log_snr)  # the bound must not pull at what the square trains
        loss = loss + weighting.variance * variational_bits((spread[0] + 1) / 2, x_hat, x, z, log_snr, weighting.step)
    return loss


def variational_bits(place: Tensor, x_hat: Tensor, x: Tensor, z: Tensor, log_snr: Tensor, step: ReverseStep) -> Tensor:
    """The variational bound's term of one step, in bits per dimension: (B,).

    place: where the log variance lies, 0 the posterior's, 1 that of beta. x_hat, x, z: (B, C, H, W), x in [-1, 1] on
    255 levels. The KL divergence of the true posterior from ours; in the step to the clean picture the likelihood of
    x. Source: Ho et al. (2020) eq. 5 and 13; Nichol & Dhariwal (2021) eq. 15 for the variance.
    """
    true_mean, _ = posterior(x, z, log_snr, step.before)
    mean, _ = posterior(x_hat, z, log_snr, step.before)
    log_variance = torch.lerp(step.small, step.large, place)
    ratio = step.small - log_variance
    divergence = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp())
    nats = torch.where(step.before >= CLEAN, -log_likelihood(x, mean, log_variance), divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the probability that a Gaussian gives to the bin of x, one of 256 levels in [-1, 1]; shaped like x.

    The outermost bins reach to infinity. Source: Ho et al. (2020) eq. 13. Far from the mean, where the cumulative
    distribution is 1 but for rounding, or 0, the mirrored bin's logarithms are subtracted instead: right in float32 at
    any distance, with a gradient.
    """
    scale = (-0.5 * log_variance).exp()
    above = torch.where(x > 0.999, _EDGE, (x - mean + 1 / 255) * scale)
    below = torch.where(x < -0.999, -_EDGE, (x - mean - 1 / 255) * scale)
    mirrored = above + below > 0
    above, below = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    around = torch.special.ndtr(above) - torch.special.ndtr(below)  # a bin that the mean lies in or next to
    log_above, log_below = (_log_lower_tail(end.clamp(max=0)) for end in (above, below))
    beyond = log_above + torch.log(-torch.expm1((log_below - log_above).clamp(max=-_LEAST)))
    return torch.where(above > 0, around.clamp(min=_LEAST).log(), beyond)


_EDGE = 1e4
"""As many standard deviations as stand for infinity, whose gradient would not be a number."""
_LEAST = 1e-12


def _log_lower_tail(x: Tensor) -> Tensor:
    """Log of the probability that a standard normal number is below x <= 0. torch's own `log_ndtr` is not for MPS."""
    return torch.special.erfcx(-x / math.sqrt(2)).log() - math.log(2) - x.square() / 2


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
