"""Diffusion in float64 NumPy, from Prince (2023) chapter 18, in the book's betas and alphas, without log SNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def alphas(betas: Array) -> Array:
    """alpha_1 .. alpha_T = prod(1 - beta_s), eq. 18.7."""
    return np.cumprod(1.0 - betas)


def linear_betas(steps: int, first: float, last: float) -> Array:
    """beta_1 .. beta_T in equal steps."""
    return np.array([first + (last - first) * index / (steps - 1) for index in range(steps)])


def squared_cosine_betas(steps: int, cap: float) -> Array:
    """Nichol & Dhariwal (2021) eq. 17."""
    f = [math.cos((index / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for index in range(steps + 1)]
    return np.array([min(1 - f[index + 1] / f[index], cap) for index in range(steps)])


def one_step_back(x: Array, z: Array, beta: float, alpha_t: float, alpha_before: float) -> tuple[Array, float]:
    """Mean and variance of q(z_{t-1} | z_t, x), eq. 18.15."""
    from_z = (1 - alpha_before) / (1 - alpha_t) * math.sqrt(1 - beta)
    from_x = math.sqrt(alpha_before) * beta / (1 - alpha_t)
    return from_z * z + from_x * x, beta * (1 - alpha_before) / (1 - alpha_t)


def bayes_back(x: Array, z: Array, alpha_t: float, alpha_s: float) -> tuple[Array, float]:
    """Mean and variance of q(z_s | z_t, x) by Bayes' rule: the product of two Gaussians in z_s.

    Prior N(sqrt(alpha_s) x, 1 - alpha_s); likelihood of z_t, N(sqrt(alpha_t / alpha_s) z_s, 1 - alpha_t / alpha_s).
    """
    kept = math.sqrt(alpha_t / alpha_s)
    precision = 1 / (1 - alpha_s) + kept**2 / (1 - kept**2)
    mean = (math.sqrt(alpha_s) * x / (1 - alpha_s) + kept * z / (1 - kept**2)) / precision
    return mean, 1 / precision


def loss_18_1(network: Callable[[Array, int], Array], x: Array, eps: Array, t: int, alpha: Array) -> float:
    """The square of algorithm 18.1 for one picture at step t (1 .. T), as a mean over its values."""
    z = math.sqrt(alpha[t - 1]) * x + math.sqrt(1 - alpha[t - 1]) * eps
    return float(np.mean((network(z, t) - eps) ** 2))


def sample_18_2(
    network: Callable[[Array, int], Array], z: Array, betas: Array, noise: Sequence[Array], large_variance: bool
) -> Array:
    """Algorithm 18.2 from z = z_T; sigma_t^2 is beta_t, or the variance of eq. 18.15. noise: one for t = T .. 2."""
    alpha = alphas(betas)
    for t in range(len(betas), 0, -1):
        beta, alpha_t = betas[t - 1], alpha[t - 1]
        eps = network(z, t)
        z = z / math.sqrt(1 - beta) - beta / (math.sqrt(1 - alpha_t) * math.sqrt(1 - beta)) * eps
        if t > 1:
            sigma_squared = beta if large_variance else beta * (1 - alpha[t - 2]) / (1 - alpha_t)
            z = z + math.sqrt(sigma_squared) * noise[len(betas) - t]
    return z
