"""The same pictures as k-diffusion's samplers, which use variance-exploding noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade.diffusion.noise import CLEAN, noise_like
from cascade.diffusion.samplers import sample_ddim, sample_ddpm, sample_dpmpp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what a peer's import deprecates is not ours
    peer = pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)

pytestmark = pytest.mark.slow

LEVELS = torch.linspace(-8, 8, 33)
"""Log SNR of each step; multiples of 1/2, which float32 holds exactly."""
SIGMAS = torch.cat([torch.exp(-LEVELS.double() / 2), torch.zeros(1, dtype=torch.float64)])
START = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def toy_x_hat(z: Tensor, log_snr: Tensor) -> Tensor:
    """Bounded, not linear, and different at each level; z has variance-preserving noise."""
    alpha = torch.sigmoid(log_snr.double())
    return torch.tanh(1.5 * alpha.sqrt() * z + 0.3 * alpha)


def their_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """`toy_x_hat` of a picture x + sigma eps."""
    log_snr = -2 * sigma.log()[:, None, None, None]
    return toy_x_hat(x * torch.sigmoid(log_snr).sqrt(), log_snr)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(sample_ddim, peer.sample_euler, id="ddim is euler"),
        pytest.param(sample_dpmpp, peer.sample_dpmpp_2m, id="dpm++ is dpmpp_2m"),
        pytest.param(sample_ddpm, peer.sample_euler_ancestral, id="ddpm is euler_ancestral"),
    ],
)
def test_the_sampler_equals_k_diffusions(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> None:
    rng = generators()
    noise = {"noise_sampler": lambda *_: noise_like(START, rng)} if ours is sample_ddpm else {}
    alpha = torch.sigmoid(LEVELS[0].double())
    expected = theirs(their_denoiser, START / alpha.sqrt(), SIGMAS, disable=True, **noise)
    found = ours(toy_x_hat, START, torch.cat([LEVELS, torch.tensor([CLEAN])]), generators())
    # float32 in the coefficients of 33 steps, whose errors the slope of the denoiser hands on
    assert (found - expected).square().mean().sqrt() < 1e-7
