"""The Gaussian identities against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import chapter18

from cascade.diffusion.noise import (
    LOG_SNR_RANGE,
    alpha,
    diffuse,
    diffuse_step,
    log_snr_from_std,
    noise_like,
    one_minus_alpha,
    posterior,
    predicted_eps,
    step_beta,
)
from cascade.diffusion.schedules import DiscreteSchedule, linear_betas

T = 1000
BETAS = chapter18.linear_betas(T, 1e-4, 0.02)
ALPHAS = chapter18.alphas(BETAS)


def level(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def level_of_alpha(value: float) -> torch.Tensor:
    return level(float(np.log(value / (1 - value))))


def pictures(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("log_snr", [-20.0, -15.0, -3.0, 0.0, 3.0, 15.0, 20.0])
def test_signal_and_noise_shares_keep_float32_accuracy_at_extreme_levels(log_snr: float) -> None:
    # 8 units in the last place of float32: what sigmoid may cost.
    accurate = {"rtol": 1e-6, "atol": 0.0}
    exact_alpha, exact_rest = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
    np.testing.assert_allclose(alpha(level(log_snr)).item(), exact_alpha, **accurate)
    np.testing.assert_allclose(one_minus_alpha(level(log_snr)).item(), exact_rest, **accurate)


def test_augmentation_level_is_the_standard_deviation_of_the_noise() -> None:
    std = torch.tensor([0.01, 0.1, 0.3, 0.9, 0.999])
    torch.testing.assert_close(one_minus_alpha(log_snr_from_std(std)).sqrt(), std, rtol=1e-5, atol=0)
    assert log_snr_from_std(torch.tensor(0.0)).item() == LOG_SNR_RANGE[1]
    assert log_snr_from_std(std).dtype == torch.float32


@pytest.mark.parametrize("step", [1, 10, 500, 1000])
def test_diffuse_is_the_closed_form(step: int) -> None:
    x, eps, a = pictures(0), pictures(1), ALPHAS[step - 1]
    expected = np.sqrt(a) * x.double().numpy() + np.sqrt(1 - a) * eps.double().numpy()
    # 20 roundings of float32, on values up to 4
    np.testing.assert_allclose(diffuse(x, eps, level_of_alpha(a)).numpy(), expected, rtol=0, atol=5e-6)


def test_repeated_single_steps_have_mean_and_variance_of_the_closed_form() -> None:
    samples, steps = 20_000, 100
    rng = torch.Generator().manual_seed(0)
    x = 0.7
    z = torch.full((samples,), x, dtype=torch.float64)
    for beta in torch.linspace(1e-3, 0.05, steps, dtype=torch.float64):
        z = diffuse_step(z, torch.randn(samples, generator=rng, dtype=torch.float64), beta)
    a = chapter18.alphas(chapter18.linear_betas(steps, 1e-3, 0.05))[-1]
    # 4 standard errors: sqrt(variance / n) of a mean, variance sqrt(2 / n) of a variance
    assert abs(z.mean().item() - np.sqrt(a) * x) < 4 * np.sqrt((1 - a) / samples)
    assert abs(z.var().item() - (1 - a)) < 4 * (1 - a) * np.sqrt(2 / samples)


@pytest.mark.parametrize("step", [2, 3, 100, 999, 1000])
def test_posterior_of_neighbouring_steps_is_equation_18_15(step: int) -> None:
    x, z = pictures(0), pictures(1)
    mean, variance = posterior(x, z, level_of_alpha(ALPHAS[step - 1]), level_of_alpha(ALPHAS[step - 2]))
    expected, expected_variance = chapter18.one_step_back(
        x.double().numpy(), z.double().numpy(), BETAS[step - 1], ALPHAS[step - 1], ALPHAS[step - 2]
    )
    # The difference of two log SNR of size 10 carries their rounding, 1e-6, into a beta of at least 1e-4.
    np.testing.assert_allclose(mean.numpy(), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(variance.item(), expected_variance, rtol=2e-3)


@pytest.mark.parametrize(("t", "s"), [(1000, 1), (1000, 999), (700, 300), (50, 1), (3, 1)])
def test_posterior_between_any_two_steps_is_bayes_rule(t: int, s: int) -> None:
    x, z = pictures(0), pictures(1)
    a_t, a_s = ALPHAS[t - 1], ALPHAS[s - 1]
    mean, variance = posterior(x.double(), z.double(), level_of_alpha(a_t).double(), level_of_alpha(a_s).double())
    expected, expected_variance = chapter18.bayes_back(x.double().numpy(), z.double().numpy(), a_t, a_s)
    # `level_of_alpha` rounds to float32
    np.testing.assert_allclose(mean.numpy(), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(variance.item(), expected_variance, rtol=2e-3)


def test_posterior_is_exact_in_float32_at_extreme_levels() -> None:
    x, z = pictures(0), pictures(1)
    for t, s in [(-20.0, -19.0), (-20.0, 20.0), (15.0, 16.0), (19.0, 20.0)]:
        mean, variance = posterior(x, z, level(t), level(s))
        ratio = np.exp(t - s)
        a_t, a_s = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        expected = ratio * np.sqrt(a_s / a_t) * z.double().numpy() + (1 - ratio) * np.sqrt(a_s) * x.double().numpy()
        np.testing.assert_allclose(mean.numpy(), expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(variance.item(), (1 - ratio) / (1 + np.exp(s)), rtol=2e-6)


def test_step_beta_of_neighbouring_steps_is_the_schedules_beta() -> None:
    levels = DiscreteSchedule(linear_betas(1e-4, 0.02, T)).table[1:, None, None, None]
    betas = step_beta(levels[1:], levels[:-1])
    np.testing.assert_allclose(betas.flatten().numpy(), BETAS[1:], rtol=1e-9)


def test_predicted_eps_is_the_noise_that_was_added() -> None:
    x, eps = pictures(0), pictures(1)
    for value in (-20.0, 0.0, 5.0):
        z = diffuse(x, eps, level(value))
        # rounding of z, 2e-7, is divided by the standard deviation of the noise
        tolerance = 1e-6 / float(one_minus_alpha(level(value)).sqrt())
        torch.testing.assert_close(predicted_eps(x, z, level(value)), eps, rtol=0, atol=tolerance)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_noise_of_a_picture_does_not_depend_on_its_batch() -> None:
    z = torch.empty(3, 3, 4, 5)
    together = noise_like(z, generators(7, 8, 9))
    assert torch.equal(noise_like(z[:1], generators(8)), together[1:2])
    assert torch.equal(noise_like(z, generators(9, 8, 7)), together.flip(0))


def test_noise_is_drawn_in_float32_whatever_the_dtype() -> None:
    z = torch.empty(1, 3, 4, 4)
    full = noise_like(z, generators(3))
    assert torch.equal(noise_like(z.bfloat16(), generators(3)), full.bfloat16())


def test_noise_needs_one_generator_per_picture() -> None:
    with pytest.raises(ValueError, match="2 generators for 3 pictures"):
        noise_like(torch.empty(3, 3, 2, 2), generators(0, 1))
