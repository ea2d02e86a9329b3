"""Problems solved exactly: the best denoiser and the exact flow for Gaussian data, in float64 NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def best_denoiser(z: Array, alpha: float, mean: float, std: float) -> Array:
    """E[x | z] for x ~ N(mean, std^2) and z = sqrt(alpha) x + sqrt(1 - alpha) eps."""
    gain = np.sqrt(alpha) * std**2 / (alpha * std**2 + 1 - alpha)
    return mean + gain * (z - np.sqrt(alpha) * mean)


def exact_flow(z: Array, alpha_from: float, alpha_to: float, mean: float, std: float) -> Array:
    """The result of the probability flow, which keeps z's distance from the mean in standard deviations of z."""
    distance = (z - np.sqrt(alpha_from) * mean) / np.sqrt(alpha_from * std**2 + 1 - alpha_from)
    return np.sqrt(alpha_to) * mean + np.sqrt(alpha_to * std**2 + 1 - alpha_to) * distance


def ddpm_moments(alphas: Array, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance of what ancestral sampling with the best denoiser draws, from N(0, 1) at alphas[0].

    alphas: increasing, those of the noise levels. Each step is linear in z plus Gaussian noise (none in the last),
    so both moments follow by recursion; what separates them from the data's is the bias of a finite number of steps.
    """
    m, v = 0.0, 1.0
    for index in range(len(alphas) - 1):
        a_t, a_s = alphas[index], alphas[index + 1]
        beta = 1 - a_t / a_s
        from_z = (1 - a_s) / (1 - a_t) * np.sqrt(a_t / a_s)
        from_x = np.sqrt(a_s) * beta / (1 - a_t)
        gain = np.sqrt(a_t) * std**2 / (a_t * std**2 + 1 - a_t)
        m = (from_z + from_x * gain) * m + from_x * mean * (1 - gain * np.sqrt(a_t))
        v = (from_z + from_x * gain) ** 2 * v
        if index < len(alphas) - 2:
            v += beta * (1 - a_s) / (1 - a_t)
    return float(m), float(v)


def mixture_denoiser(z: Array, alpha: float, means: Array, std: float) -> Array:
    """E[x | z] for x from an equal mixture of N(means[k], std^2), elementwise."""
    variance = alpha * std**2 + 1 - alpha
    log_density = np.stack([-((z - np.sqrt(alpha) * m) ** 2) / (2 * variance) for m in means])
    share = np.exp(log_density - log_density.max(0))
    share /= share.sum(0)
    return sum(w * best_denoiser(z, alpha, m, std) for w, m in zip(share, means, strict=True))
