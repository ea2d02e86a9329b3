"""Schedules against cumprod(1 - beta) and against their formulas, in float64 NumPy."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from reference import chapter18
from torch.nn.functional import avg_pool2d

from cascade.diffusion.noise import CLEAN, LOG_SNR_RANGE, alpha, diffuse, one_minus_alpha
from cascade.diffusion.schedules import (
    SECTIONS,
    CosineSchedule,
    DiscreteSchedule,
    NamedSteps,
    NoiseSchedule,
    constant_betas,
    linear_betas,
    log_snr_grid,
    resolution_shift,
    squared_cosine_betas,
)

T = 1000
DISCRETE = {
    "constant": (constant_betas(0.01, T), np.full(T, 0.01)),
    "linear": (linear_betas(1e-4, 0.02, T), chapter18.linear_betas(T, 1e-4, 0.02)),
    "squared cosine": (squared_cosine_betas(T), chapter18.squared_cosine_betas(T, 0.999)),
}
SCHEDULES: dict[str, NoiseSchedule] = {
    **{name: DiscreteSchedule(betas) for name, (betas, _) in DISCRETE.items()},
    "cosine": CosineSchedule(),
    "cosine with an offset": CosineSchedule(offset=0.008),
    "shifted": CosineSchedule(resolution_shift(256, 64)),
}


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_is_the_product_of_one_minus_beta_at_every_step(name: str, dtype: torch.dtype) -> None:
    betas, expected_betas = DISCRETE[name]
    np.testing.assert_allclose(betas.numpy(), expected_betas, rtol=1e-9)
    log_snr = DiscreteSchedule(betas).log_snr(torch.arange(1, T + 1, dtype=dtype) / T)
    expected = chapter18.alphas(expected_betas)
    assert log_snr.dtype == torch.float32
    # float32 log SNR of size 20 is exact to 1e-6, which is the relative error of alpha and of 1 - alpha
    np.testing.assert_allclose(alpha(log_snr).numpy(), np.clip(expected, 2.06e-9, 1), rtol=3e-6)
    np.testing.assert_allclose(one_minus_alpha(log_snr).numpy(), 1 - expected, rtol=3e-6)


def test_discrete_log_snr_is_linear_between_steps() -> None:
    schedule = DiscreteSchedule(linear_betas(1e-4, 0.02, 10))
    low, middle, high = schedule.log_snr(torch.tensor([0.3, 0.35, 0.4])).tolist()
    assert middle == pytest.approx((low + high) / 2, abs=1e-5)


def test_cosine_alpha_is_the_squared_cosine() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    expected = np.cos(np.pi * t.numpy() / 2) ** 2
    np.testing.assert_allclose(alpha(CosineSchedule().log_snr(t)).numpy(), expected, rtol=3e-6)


def test_a_cosine_with_nichols_offset_has_the_noise_of_their_discrete_one() -> None:
    schedule, steps = CosineSchedule(offset=0.008), torch.arange(1, T, dtype=torch.float64)
    noise = 1 - chapter18.alphas(chapter18.squared_cosine_betas(T, 0.999))[:-1]
    found = one_minus_alpha(schedule.log_snr(steps / T).double()).numpy()
    np.testing.assert_allclose(found, noise, rtol=3e-6)  # float32 log SNR


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls_with_time_and_is_finite_at_both_ends(name: str) -> None:
    log_snr = SCHEDULES[name].log_snr(torch.linspace(0, 1, 501))
    assert bool(torch.isfinite(log_snr).all())
    assert bool((log_snr.diff() <= 0).all())
    assert bool((log_snr[5:-5].diff() < 0).all())
    assert log_snr[0].item() == LOG_SNR_RANGE[1]
    assert log_snr[-1].item() >= LOG_SNR_RANGE[0]


def test_cosine_ends_are_clipped_to_the_given_range() -> None:
    schedule = CosineSchedule(clip=(-9.0, 11.0))
    assert schedule.log_snr(torch.tensor([0.0, 1.0])).tolist() == [11.0, -9.0]


def test_shift_makes_the_averaged_picture_as_noisy_as_the_reference() -> None:
    """Averaging 4x4 pixels divides the noise variance by 16; the shift multiplies it by 16 (simple diffusion)."""
    reference, shifted = CosineSchedule(), CosineSchedule(resolution_shift(256, 64))
    t = torch.tensor([0.3, 0.5, 0.8])
    torch.testing.assert_close(shifted.log_snr(t), reference.log_snr(t) + 2 * math.log(64 / 256))
    eps = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    log_snr = shifted.log_snr(t)[1].reshape(1, 1, 1, 1)
    z = avg_pool2d(diffuse(torch.ones_like(eps), eps, log_snr), 4)
    snr = (z.mean() ** 2 / z.var()).item()
    # 4 standard errors of a variance over 64 * 64 values, 9 %
    assert snr == pytest.approx(math.exp(reference.log_snr(t)[1].item()), rel=0.09)


def test_grid_of_all_steps_is_the_schedule_backwards() -> None:
    schedule = DiscreteSchedule(linear_betas(1e-4, 0.02, T))
    grid = log_snr_grid(schedule, T)
    assert grid.shape == (T + 1,)
    torch.testing.assert_close(grid, schedule.table.flip(0).float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["t", "log_snr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_grid_runs_from_noise_to_clean(name: str, spacing: str, steps: int) -> None:
    grid = log_snr_grid(SCHEDULES[name], steps, spacing)
    assert grid.shape == (steps + 1,)
    assert bool((grid.diff() > 0).all())
    torch.testing.assert_close(grid[0], SCHEDULES[name].log_snr(torch.tensor(1.0)))
    assert grid[-1].item() == CLEAN


def test_grid_even_in_log_snr_has_equal_steps() -> None:
    steps = log_snr_grid(CosineSchedule(), 20, "log_snr").diff()
    torch.testing.assert_close(steps, torch.full((20,), 2.0), rtol=0, atol=1e-5)


def test_every_named_step_list_can_be_asked_for_and_is_there() -> None:
    assert set(get_args(NamedSteps)) == SECTIONS.keys()
