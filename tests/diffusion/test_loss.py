"""Algorithm 18.1, the weightings, and the distributions of noise levels."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from helpers_diffusion import from_x
from reference import chapter18

from cascade.diffusion.loss import (
    Weighting,
    diffusion_loss,
    log_likelihood,
    logit_normal_levels,
    stratify,
    uniform_levels,
)
from cascade.diffusion.noise import Prediction, to_x
from cascade.diffusion.schedules import CosineSchedule, DiscreteSchedule, linear_betas

KINDS: tuple[Prediction, ...] = get_args(Prediction)
T = 1000
SCHEDULE = DiscreteSchedule(linear_betas(1e-4, 0.02, T))


def pictures(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_eps_loss_is_algorithm_18_1() -> None:
    x, eps, steps = pictures(0), pictures(1), [1, 20, 500, 1000]
    log_snr = uniform_levels(SCHEDULE, (torch.tensor(steps, dtype=torch.float64) - 0.5) / T)
    loss = diffusion_loss(lambda z, _: torch.tanh(2 * z) + 0.3, "eps", Weighting("eps"), x, log_snr, eps)
    alphas = chapter18.alphas(chapter18.linear_betas(T, 1e-4, 0.02))
    expected = [
        chapter18.loss_18_1(
            lambda z, _: np.tanh(2 * z) + 0.3, x[i].double().numpy(), eps[i].double().numpy(), t, alphas
        )
        for i, t in enumerate(steps)
    ]
    assert loss.shape == (4,)
    # float32 in z and in the square
    np.testing.assert_allclose(loss.numpy(), expected, rtol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", KINDS)
def test_loss_is_the_square_in_its_space_whatever_the_network_predicts(kind: Prediction, space: Prediction) -> None:
    x, eps = pictures(0).double(), pictures(1).double()
    log_snr = torch.tensor([-6.0, -1.0, 2.0, 6.0]).double()[:, None, None, None]

    def predicts(what: Prediction) -> torch.Tensor:
        return diffusion_loss(
            lambda z, level: from_x(what, torch.tanh(z), z, level), what, Weighting(space), x, log_snr, eps
        )

    # `diffusion_loss` squares in float32
    torch.testing.assert_close(predicts(kind), predicts(space), rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_exactly_one_in_the_networks_own_space(kind: Prediction) -> None:
    log_snr = torch.linspace(-20, 20, 41)
    assert torch.equal(Weighting(kind).on_output(kind, log_snr), torch.ones(41))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weight_on_the_square_in_x_is_the_smaller_of_snr_and_gamma(kind: Prediction) -> None:
    log_snr = torch.linspace(-8, 8, 17, dtype=torch.float64)
    snr = log_snr.exp()
    weighting = Weighting(min_snr_gamma=5.0)
    torch.testing.assert_close(weighting.log_in_x(log_snr).exp(), snr.clamp(max=5.0))
    # Hang et al. (2023) sec. 3.4: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v
    in_x = {"x": torch.ones_like(snr), "eps": snr, "v": 1 + snr, "velocity": (1 + snr.sqrt()) ** 2}[kind]
    torch.testing.assert_close(weighting.on_output(kind, log_snr), snr.clamp(max=5.0) / in_x)


def test_max_weight_caps_the_weight_in_x() -> None:
    log_snr = torch.tensor([-2.0, 0.0, 10.0])
    weight = Weighting("eps", max_weight=3.0).log_in_x(log_snr).exp()
    torch.testing.assert_close(weight, torch.tensor([math.exp(-2), 1.0, 3.0]))


def test_loss_of_a_bfloat16_network_is_float32() -> None:
    log_snr = torch.zeros(4, 1, 1, 1)
    loss = diffusion_loss(lambda z, _: z.bfloat16(), "v", Weighting("v"), pictures(0), log_snr, pictures(1))
    assert loss.dtype == torch.float32


def test_every_discrete_step_is_equally_likely() -> None:
    small = DiscreteSchedule(linear_betas(1e-4, 0.02, 5))
    u = (torch.arange(1000) + 0.5) / 1000
    drawn, counts = uniform_levels(small, u).flatten().unique(return_counts=True)
    torch.testing.assert_close(drawn, small.table[1:].float().sort().values)
    assert counts.tolist() == [200] * 5


def test_largest_random_number_still_draws_a_step() -> None:
    u = torch.tensor([0.0, 1 - 2**-24, 1.0])
    assert uniform_levels(SCHEDULE, u).flatten().tolist() == SCHEDULE.table[[1, T, T]].float().tolist()


def test_continuous_time_is_uniform() -> None:
    u = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(uniform_levels(CosineSchedule(), u).flatten(), CosineSchedule().log_snr(u))


def test_logit_normal_levels_have_the_stated_quantiles() -> None:
    u = torch.tensor([0.5, 0.841344746, 0.158655254])  # the median, and one standard deviation above and below
    levels = logit_normal_levels(CosineSchedule(), u, mean=0.4, std=1.5)
    assert levels.shape == (3, 1, 1, 1)
    torch.testing.assert_close(levels.flatten(), torch.tensor([-0.8, -3.8, 2.2]), rtol=0, atol=1e-5)


def test_logit_normal_levels_stay_within_the_schedule() -> None:
    schedule = CosineSchedule(clip=(-3.0, 4.0))
    levels = logit_normal_levels(schedule, torch.tensor([0.0, 1.0]), mean=0.0, std=2.0)
    assert levels.flatten().tolist() == [4.0, -3.0]


def test_stratified_numbers_fall_one_into_each_part() -> None:
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    assert torch.equal((stratify(u, positions, 8) * 8).floor().long(), positions)


def test_to_x_of_the_loss_target_has_zero_loss() -> None:
    x, eps = pictures(0), pictures(1)
    log_snr = torch.tensor([-4.0, -1.0, 0.0, 3.0])[:, None, None, None]
    for kind in KINDS:
        perfect = diffusion_loss(
            lambda z, level, kind=kind: from_x(kind, x, z, level), kind, Weighting(kind), x, log_snr, eps
        )
        # rounding of z divided by the least noise, 0.2, squared
        assert perfect.max().item() < 1e-10
        assert to_x(kind, x, x, log_snr).shape == x.shape


def probability(x: float, mean: float, std: float) -> float:
    """That of x's bin, in float64: the tails by the complementary error function on their own side."""
    low, high = (x - mean - 1 / 255) / std, (x - mean + 1 / 255) / std
    low, high = (-math.inf if x < -0.999 else low), (math.inf if x > 0.999 else high)
    low, high = (-high, -low) if low + high > 0 else (low, high)
    return 0.5 * (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2)))


@pytest.mark.parametrize("std", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-1.4, -0.7, 0.0, 0.3, 1.0])
def test_the_likelihood_of_a_bin_is_right_in_float32_in_both_tails(std: float, mean: float) -> None:
    bins = torch.linspace(-1, 1, 256)
    log_variance = torch.tensor(2 * math.log(std), requires_grad=True)
    found = log_likelihood(bins, torch.tensor(mean), log_variance)
    expected = [probability(x, mean, std) for x in bins.double().tolist()]
    known = torch.tensor([p > 1e-300 for p in expected])  # 37 standard deviations
    logs = torch.tensor([math.log(p) if p > 1e-300 else 0.0 for p in expected])
    # float32 in x - mean: 6e-8 of a bin's 1/255 at one standard deviation, times the distance in the tails
    torch.testing.assert_close(found[known], logs[known], rtol=2e-4, atol=5e-5)
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.sum(), log_variance)
    assert gradient.isfinite()


def test_the_likelihood_of_a_far_bin_pulls_the_variance_towards_it() -> None:
    """Where float32's cumulative distribution is 1 there was no gradient."""
    log_variance = torch.full((2,), 2 * math.log(0.05), requires_grad=True)
    log_likelihood(torch.tensor([-0.9, 0.9]), torch.tensor([0.6, -0.6]), log_variance).sum().backward()
    # d log N(x; 0, s^2) / d log s^2 = ((x / s)^2 - 1) / 2, at a distance of 30 s
    torch.testing.assert_close(log_variance.grad, torch.full((2,), 30.0**2 / 2), rtol=0.01, atol=0)
