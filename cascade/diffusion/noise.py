"""The Gaussian identities of diffusion, in one coordinate: log SNR; and the quantities that a network predicts.

A noisy picture is z = sqrt(alpha) x + sqrt(1 - alpha) eps, and log SNR = log alpha / (1 - alpha). Every log SNR
here is float32 of shape (B, 1, 1, 1). `one_minus_alpha` exists because in float32 `1 - alpha` is zero at low noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cascade.system.transfer import on_device

Estimate = Tensor | tuple[Tensor, Tensor]
"""x_hat (B, C, H, W), alone or with the place of the log variance between the posterior's (0) and that of beta (1).

A place instead of a variance, because a denoiser does not know the length of the next step (Nichol & Dhariwal 2021,
eq. 15)."""

Denoiser = Callable[[Tensor, Tensor], Estimate]
"""(z, log_snr) -> estimate: (B, C, H, W), (B, 1, 1, 1) -> one or two tensors (B, C, H, W)."""

LOG_SNR_RANGE = (-20.0, 20.0)
"""Log SNR is clipped to this range where a formula would reach infinity; its ends leave 2e-9 of signal or noise."""

CLEAN = LOG_SNR_RANGE[1]
"""Log SNR of a picture without noise: a sampler whose last level is this or more returns x itself."""


def x_of(estimate: Estimate) -> Tensor:
    """The x_hat of an estimate."""
    return estimate[0] if isinstance(estimate, tuple) else estimate


_numbers = WeakTensorKeyDictionary()


def note_number(log_snr: Tensor, number: float) -> Tensor:
    """log_snr with the attached note that all its pictures have the log SNR `number`; see `number_of`."""
    _numbers[log_snr] = number
    return log_snr


def number_of(log_snr: Tensor) -> float:
    """The common log SNR of a batch whose pictures all have the same, as in a sampler.

    Read from the sampler's note if present: reading it from a GPU would wait for all of its queued work.
    """
    number = _numbers.get(log_snr)
    return float(log_snr.flatten()[0]) if number is None else float(number)


def alpha(log_snr: Tensor) -> Tensor:
    """Share of the variance that is signal, prod(1 - beta_s) (Prince 2023, eq. 18.7)."""
    return torch.sigmoid(log_snr)


def one_minus_alpha(log_snr: Tensor) -> Tensor:
    """Share of the variance that is noise, exact where alpha rounds to 1."""
    return torch.sigmoid(-log_snr)


def log_snr_from_std(std: Tensor) -> Tensor:
    """Log SNR at which variance-preserving noise has this standard deviation, in [0, 1); clipped.

    The one place where `aug_level` becomes a log SNR: std^2 = 1 - alpha.
    """
    return -torch.logit(std.double().square()).clamp(*LOG_SNR_RANGE).to(torch.float32)


def diffuse_step(z: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    """One step of the forward process, z_t = sqrt(1 - beta_t) z_{t-1} + sqrt(beta_t) eps (Prince 2023, eq. 18.1)."""
    return (1 - beta).sqrt() * z + beta.sqrt() * eps


def diffuse(x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """A sample of q(z_t | x) = N(sqrt(alpha) x, 1 - alpha) (Prince 2023, eq. 18.8).

    x, eps: (B, C, H, W); log_snr: (B, 1, 1, 1).
    """
    return alpha(log_snr).sqrt() * x + one_minus_alpha(log_snr).sqrt() * eps


def step_beta(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """Variance added between noise level s and a higher level t: beta = 1 - alpha_t / alpha_s.

    For neighbouring steps of a discrete schedule it is beta_t. Written as
    (1 - SNR_t / SNR_s)(1 - alpha_t), which does not cancel in float32.
    """
    return -torch.expm1(log_snr_t - log_snr_s) * one_minus_alpha(log_snr_t)


def posterior(x: Tensor, z: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(z_s | z_t, x): one step back, from noise level t to a lower level s.

    x, z: (B, C, H, W), x in [-1, 1].  log_snr_*: (B, 1, 1, 1), log_snr_s > log_snr_t.
    Source: Prince (2023) eq. 18.15, for any s < t, written in log SNR so that float32 suffices.
    """
    ratio = torch.exp(log_snr_t - log_snr_s)  # SNR_t / SNR_s, in (0, 1)
    from_z = ratio * (alpha(log_snr_s) / alpha(log_snr_t)).sqrt()
    from_x = -torch.expm1(log_snr_t - log_snr_s) * alpha(log_snr_s).sqrt()
    variance = -torch.expm1(log_snr_t - log_snr_s) * one_minus_alpha(log_snr_s)
    return from_z * z + from_x * x, variance


def predicted_eps(x_hat: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """The noise in z if x_hat is the clean picture: (z - sqrt(alpha) x_hat) / sqrt(1 - alpha)."""
    return (z - alpha(log_snr).sqrt() * x_hat) / one_minus_alpha(log_snr).sqrt()


@dataclass(frozen=True)
class NoiseBetween:
    """A source of noise between two others, on the arc of the sphere between them, so that its variance stays 1.

    share: in [0, 1], how far to go. Source: slerp (Shoemake 1985), for vectors that are nearly orthogonal.
    """

    first: torch.Generator
    last: torch.Generator
    share: float

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise: float32, on the CPU."""
        angle = self.share * math.pi / 2
        return math.cos(angle) * normal(shape, self.first) + math.sin(angle) * normal(shape, self.last)


NoiseSource = torch.Generator | NoiseBetween
"""The source of all noise of one picture."""


def normal(shape: Sequence[int], source: NoiseSource) -> Tensor:
    """Standard normal noise from a source: float32, on the CPU."""
    if isinstance(source, NoiseBetween):
        return source.draw(shape)
    return torch.randn(tuple(shape), generator=source, dtype=torch.float32)


def noise_like(z: Tensor, rng: Sequence[NoiseSource]) -> Tensor:
    """Standard normal noise shaped like z (B, C, H, W): picture b draws only from rng[b], in float32 on the CPU.

    A picture's noise is therefore equal in bits in any batch and on any device.
    """
    if len(rng) != z.shape[0]:
        raise ValueError(f"{len(rng)} generators for {z.shape[0]} pictures; pass one per picture")
    noise = [normal(z.shape[1:], source) for source in rng]
    return on_device(torch.stack(noise), z.device).to(z.dtype)


# --- parameterization ------------------------------------------------------------------------------------------------
# Parameterizations of the network's output: eps, v, x or velocity. Each is a linear combination of z and x_hat.
#
#     eps       the noise                            (Ho et al. 2020)
#     v         sqrt(alpha) eps - sqrt(1-alpha) x    (Salimans & Ho 2022), variance preserving
#     x         the clean picture
#     velocity  eps - x, of the straight path (1-t) x + t eps   (Lipman et al. 2023)
#
# The straight path is the same process at another scale: z / (sqrt(alpha) + sqrt(1-alpha)) is on it at t =
# sqrt(1-alpha) / (sqrt(alpha) + sqrt(1-alpha)), so `velocity` needs no second kind of z.

Prediction = Literal["eps", "v", "x", "velocity"]
"""The quantity that a network predicts."""


def to_x(kind: Prediction, output: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """x_hat from a network's output. output, z: (B, C, H, W); log_snr: (B, 1, 1, 1)."""
    signal, noise = alpha(log_snr).sqrt(), one_minus_alpha(log_snr).sqrt()
    match kind:
        case "x":
            return output
        case "eps":
            return (z - noise * output) / signal
        case "v":
            return signal * z - noise * output
        case "velocity":
            return (z - noise * output) / (signal + noise)


def target(kind: Prediction, x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """The correct output for the x and eps of z."""
    match kind:
        case "x":
            return x
        case "eps":
            return eps
        case "v":
            return alpha(log_snr).sqrt() * eps - one_minus_alpha(log_snr).sqrt() * x
        case "velocity":
            return eps - x


def log_weight_in_x(kind: Prediction, log_snr: Tensor) -> Tensor:
    """log w such that |target - output|^2 = w |x - x_hat|^2: SNR, 1 + SNR, 1 or (1 + sqrt(SNR))^2."""
    match kind:
        case "x":
            return torch.zeros_like(log_snr)
        case "eps":
            return log_snr
        case "v":
            return torch.nn.functional.softplus(log_snr)
        case "velocity":
            return 2 * torch.nn.functional.softplus(log_snr / 2)
