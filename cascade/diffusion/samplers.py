"""Samplers: functions of a denoiser, a noisy tensor and noise levels, independent of text and settings files.

Common to all: z is (B, C, H, W), drawn from the noise level log_snrs[0]; log_snrs is (N + 1,), increasing; the
result is (B, C, H, W) at the level log_snrs[N], and x itself, as in algorithm 18.2, where that is `CLEAN`. Only `ddpm`
with variance `learned` uses a variance that the denoiser returns with x_hat. `on_step(step, x_hat)` is called after
each of the N steps.

A new sampler is a function here and a line in `SAMPLERS`. Its keyword-only parameters are its own settings:
`cascade.config` makes a section of them, {kind: NAME, ...}, with the first line of its docstring as title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cascade.diffusion.noise import (
    CLEAN,
    Denoiser,
    Estimate,
    NoiseSource,
    alpha,
    noise_like,
    note_number,
    number_of,
    one_minus_alpha,
    posterior,
    predicted_eps,
    step_beta,
    x_of,
)
from cascade.system.transfer import on_device

Generators = Sequence[NoiseSource]
OnStep = Callable[[int, Tensor], None]
Sampler = Callable[..., Tensor]
"""(denoise, z, log_snrs, rng, on_step, *, its own settings) -> the result."""


@dataclass(frozen=True)
class Option:
    """Description of a sampler's own setting, and the bounds of a number."""

    meaning: str
    least: float | None = None
    greatest: float | None = None


Variance = Annotated[
    Literal["posterior", "beta", "between", "learned"],
    Option("sigma_t^2: `posterior`, `beta`, or in between, at `gamma` or as the network predicts (`learned`, IF)."),
]
Gamma = Annotated[float, Option("`between`: 0 is the posterior's log variance, 1 that of beta, as in Imagen.", 0, 1)]
Eta = Annotated[float, Option("0 is deterministic, 1 adds as much noise as `ddpm`.", 0, 1)]


def _ignore(step: int, x_hat: Tensor) -> None:
    """The default callback: none."""


def _pairs(z: Tensor, log_snrs: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(step, log SNR now, log SNR next), each log SNR of shape (B, 1, 1, 1); infinite after the last step to `CLEAN`.

    With an infinite log SNR the formulas of a step give exactly x: alpha is 1, the factors of z and noise are 0.
    """
    numbers = log_snrs.tolist()
    numbers[-1] = math.inf if numbers[-1] >= CLEAN else numbers[-1]
    levels = on_device(torch.tensor(numbers), z.device)[:, None, None, None, None].expand(-1, len(z), 1, 1, 1)
    noted = [note_number(level, number) for level, number in zip(levels.unbind(), numbers, strict=True)]
    return [(step, *pair) for step, pair in enumerate(pairwise(noted))]


def _move(x_hat: Tensor, z: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """z moved from level t to s with x_hat and its eps held constant: the DDIM step.

    Source: Song et al. (2021) eq. 12 with eta = 0.
    """
    eps_hat = predicted_eps(x_hat, z, log_snr_t)
    return alpha(log_snr_s).sqrt() * x_hat + one_minus_alpha(log_snr_s).sqrt() * eps_hat


def sample_ddpm(
    denoise: Denoiser,
    z: Tensor,
    log_snrs: Tensor,
    rng: Generators,
    on_step: OnStep = _ignore,
    *,
    variance: Variance = "posterior",
    gamma: Gamma = 0.3,
) -> Tensor:
    """Ancestral sampling: z_s ~ N(mean of q(z_s | z_t, x_hat), sigma_t^2), no noise in the last step.

    variance: sigma_t^2 is the `posterior`'s, or `beta`, or `between` the two, its logarithm a fraction gamma of the way
    from the first to the second, or at the place that the denoiser returns (`learned`). Source: Prince (2023) algorithm
    18.2 with eq. 18.15; Ho et al. (2020) sec. 3.2 for the two variances; Nichol & Dhariwal (2021) eq. 15 for the
    interpolation, and Saharia et al. (2022) for a constant gamma.
    """
    for step, log_snr_t, log_snr_s in _pairs(z, log_snrs):
        estimate = denoise(z, log_snr_t)
        x_hat = x_of(estimate)
        z, spread = posterior(x_hat, z, log_snr_t, log_snr_s)
        if step < len(log_snrs) - 2:
            beta = step_beta(log_snr_t, log_snr_s)
            if variance == "beta":
                spread = beta
            elif variance == "between":
                spread = spread ** (1 - gamma) * beta**gamma  # 0, not NaN, for a step of length 0
            elif variance == "learned":
                assert isinstance(estimate, tuple), "this denoiser returns no variance with x_hat"
                spread = torch.lerp(spread.log(), beta.log(), estimate[1]).exp()
            z = z + spread.sqrt() * noise_like(z, rng)
        on_step(step, x_hat)
    return z


def sample_ddim(
    denoise: Denoiser,
    z: Tensor,
    log_snrs: Tensor,
    rng: Generators,
    on_step: OnStep = _ignore,
    *,
    eta: Eta = 0.0,
) -> Tensor:
    """DDIM: first order. eta 0 is deterministic; eta 1 has the posterior's variance and so is DDPM.

    Source: Song et al. (2021) eq. 12 and 16.
    """
    for step, log_snr_t, log_snr_s in _pairs(z, log_snrs):
        x_hat = x_of(denoise(z, log_snr_t))
        eps_hat = predicted_eps(x_hat, z, log_snr_t)
        last = step == len(log_snrs) - 2
        variance = torch.zeros_like(log_snr_t)
        if eta > 0 and not last:
            variance = eta**2 * -torch.expm1(log_snr_t - log_snr_s) * one_minus_alpha(log_snr_s)
        kept = (one_minus_alpha(log_snr_s) - variance).clamp(min=0).sqrt()
        z = alpha(log_snr_s).sqrt() * x_hat + kept * eps_hat
        if eta > 0 and not last:
            z = z + variance.sqrt() * noise_like(z, rng)
        on_step(step, x_hat)
    return z


def sample_heun(
    denoise: Denoiser,
    z: Tensor,
    log_snrs: Tensor,
    rng: Generators,  # noqa: ARG001 - every sampler takes one; this one is deterministic
    on_step: OnStep = _ignore,
) -> Tensor:
    """Heun's second-order method on the probability flow; two evaluations per step, one in the last.

    For a constant x_hat `_move` solves the flow exactly, so the correction uses the mean of x_hat at both ends of the
    step: Heun's method in the exponential form of Lu et al. (2022) arXiv 2211.01095. Karras et al. (2022) algorithm 1
    uses the mean of eps_hat instead, which multiplies a change of x_hat by s_t / 2 s_s for s = exp(-log SNR / 2):
    hundreds in the first step of a cosine schedule with even steps in time. There, on Gaussian data in 10 steps, its
    error is 10 and that of this form 0.07.
    Source: Lu et al. (2022) arXiv 2211.01095.
    """
    for step, log_snr_t, log_snr_s in _pairs(z, log_snrs):
        x_hat = x_of(denoise(z, log_snr_t))
        z_next = _move(x_hat, z, log_snr_t, log_snr_s)
        if step < len(log_snrs) - 2:
            x_next = x_of(denoise(z_next, log_snr_s))
            z_next = _move((x_hat + x_next) / 2, z, log_snr_t, log_snr_s)
        z = z_next
        on_step(step, x_hat)
    return z


def sample_dpmpp(
    denoise: Denoiser,
    z: Tensor,
    log_snrs: Tensor,
    rng: Generators,  # noqa: ARG001 - every sampler takes one; this one is deterministic
    on_step: OnStep = _ignore,
) -> Tensor:
    """DPM-Solver++(2M): second order with one evaluation per step, x_hat extrapolated from the previous step.

    With lambda = log SNR / 2 and r = h_before / h: x = x_hat + (x_hat - x_before) / (2 r). The last step is of
    first order, since lambda jumps there; so is a step after one so short that its slope would be only rounding error.
    Source: Lu et al. (2022) arXiv 2211.01095, algorithm 2.
    """
    x_before: Tensor | None = None
    h_before, length_before = torch.zeros(()), 0.0
    for step, log_snr_t, log_snr_s in _pairs(z, log_snrs):
        x_hat = x_of(denoise(z, log_snr_t))
        h, length = log_snr_s - log_snr_t, number_of(log_snr_s) - number_of(log_snr_t)
        x = x_hat
        if x_before is not None and step < len(log_snrs) - 2 and length_before > LEAST_SHARE * length:
            x = x_hat + h / (2 * h_before) * (x_hat - x_before)
        z = _move(x, z, log_snr_t, log_snr_s)
        x_before, h_before, length_before = x_hat, h, length
        on_step(step, x_hat)
    return z


LEAST_SHARE = 0.01
"""Least length of the previous step in log SNR, as a share of this step's, from which `dpm++` takes a slope: it
multiplies the difference of two x_hat, with a bfloat16 rounding error of 4e-3, by half the inverse. A clipped schedule
in many steps has steps of length 0 at its ends, and joined lists of levels may hold two that differ by rounding."""


SAMPLERS: Mapping[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "heun": sample_heun,
    "dpm++": sample_dpmpp,
}
"""Samplers by their name in settings."""


def evaluations(sampler: Sampler, log_snrs: Tensor, **own: Any) -> list[float]:
    """Log SNR of each evaluation of the denoiser by a sampler with the levels log_snrs (N + 1,), in order.

    own: the sampler's own settings. Found by running it on one value with a denoiser that only records its calls.
    """
    seen: list[float] = []

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        seen.append(number_of(log_snr))
        return torch.zeros_like(z), torch.zeros_like(z)  # with a variance, for samplers that need one

    sampler(denoise, torch.zeros(1, 1, 1, 1), log_snrs, [torch.Generator()], **own)
    return seen
