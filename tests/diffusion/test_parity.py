"""The same pictures as diffusers' schedulers, from the same denoiser, noise levels and noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.diffusion.samplers import sample_ddim, sample_ddpm, sample_dpmpp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what a peer's import deprecates is not ours
    diffusers = pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

CLEAN = 60.0
"""Log SNR that float32 cannot tell from infinity, where diffusers' schedulers end."""
BETAS = ["linear", "squaredcos_cap_v2"]


def tolerance(alphas: list[float]) -> float:
    """float32 rounding, which the slope of the toy denoiser hands on from step to step, up to 7e-5 in 1000 steps.

    diffusers gets x_hat back out of eps, which divides rounding by sqrt(alpha); the squared cosine begins at 2e-9.
    """
    return 1e-4 + 3e-8 / alphas[0] ** 0.5


def toy_x_hat(z: Tensor, alpha: float) -> Tensor:
    """Bounded, not linear, and different at each level."""
    return torch.tanh(1.5 * alpha**0.5 * z + 0.3 * alpha)


def start() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(11))


def run_peer(scheduler: Any, alphas: list[float], **step: Any) -> Tensor:
    """The loop of a diffusers pipeline, with the toy denoiser as a network that predicts eps."""
    z = start()
    for t, alpha in zip(scheduler.timesteps, alphas, strict=True):
        eps = (z - alpha**0.5 * toy_x_hat(z, alpha)) / (1 - alpha) ** 0.5
        z = scheduler.step(eps, t, z, **step).prev_sample
    return z


def run_ours(sampler: Callable[..., Tensor], alphas: list[float], **options: Any) -> Tensor:
    log_snrs = torch.tensor([*torch.logit(torch.tensor(alphas, dtype=torch.float64)).tolist(), CLEAN])
    rng = [torch.Generator().manual_seed(3)]
    return sampler(lambda z, log_snr: toy_x_hat(z, torch.sigmoid(log_snr).item()), start(), log_snrs, rng, **options)


def levels(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return [scheduler.alphas_cumprod[t].item() for t in scheduler.timesteps]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [5, 50, 1000])
@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small", "posterior"), ("fixed_large", "beta")])
def test_ddpm_equals_diffusers(betas: str, steps: int, theirs: str, ours: str) -> None:
    scheduler = DDPMScheduler(beta_schedule=betas, variance_type=theirs, prediction_type="epsilon", clip_sample=False)
    alphas = levels(scheduler, steps)
    peer = run_peer(scheduler, alphas, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run_ours(sample_ddpm, alphas, variance=ours), peer, rtol=0, atol=tolerance(alphas))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(betas: str, steps: int, eta: float) -> None:
    scheduler = DDIMScheduler(beta_schedule=betas, prediction_type="epsilon", clip_sample=False)
    alphas = levels(scheduler, steps)
    peer = run_peer(scheduler, alphas, eta=eta, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run_ours(sample_ddim, alphas, eta=eta), peer, rtol=0, atol=tolerance(alphas))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers: np.array(tensor)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dpm_solver_equals_diffusers(betas: str, steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=betas,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        prediction_type="epsilon",
    )
    scheduler.set_timesteps(steps)
    # This scheduler keeps sigma = sqrt((1 - alpha) / alpha), and interpolates it.
    alphas = [1 / (1 + sigma**2) for sigma in scheduler.sigmas[:-1].double().tolist()]
    assert scheduler.sigmas[-1] == 0
    torch.testing.assert_close(
        run_ours(sample_dpmpp, alphas), run_peer(scheduler, alphas), rtol=0, atol=tolerance(alphas)
    )
