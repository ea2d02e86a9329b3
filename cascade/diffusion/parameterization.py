"""Parameterizations of the network's output: eps, v, x or velocity. Each is a linear combination of z and x_hat.

    eps       the noise                            (Ho et al. 2020)
    v         sqrt(alpha) eps - sqrt(1-alpha) x    (Salimans & Ho 2022), variance preserving
    x         the clean picture
    velocity  eps - x, of the straight path (1-t) x + t eps   (Lipman et al. 2023)

The straight path is the same process at another scale: z / (sqrt(alpha) + sqrt(1-alpha)) is on it at
t = sqrt(1-alpha) / (sqrt(alpha) + sqrt(1-alpha)), so `velocity` needs no second kind of z.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion.noise import alpha, one_minus_alpha

Kind = Literal["eps", "v", "x", "velocity"]
"""The quantity that a network predicts."""


def to_x(kind: Kind, output: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
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


def target(kind: Kind, x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
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


def log_weight_in_x(kind: Kind, log_snr: Tensor) -> Tensor:
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
