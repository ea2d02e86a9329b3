"""Samplers on problems that are solved exactly, and algorithm 18.2 step for step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import chapter18, gaussian
from torch import Tensor

from cascade.diffusion.noise import CLEAN, alpha, noise_like, one_minus_alpha, to_x
from cascade.diffusion.samplers import sample_ddim, sample_ddpm, sample_dpmpp, sample_heun
from cascade.diffusion.schedules import CosineSchedule, DiscreteSchedule, linear_betas, log_snr_grid

MEAN, STD = 0.3, 0.5
SAMPLERS = [sample_ddpm, sample_ddim, sample_heun, sample_dpmpp]


def best_denoiser(z: Tensor, log_snr: Tensor) -> Tensor:
    """E[x | z] for x ~ N(MEAN, STD^2)."""
    a, rest = alpha(log_snr), one_minus_alpha(log_snr)
    return MEAN + a.sqrt() * STD**2 / (a * STD**2 + rest) * (z - a.sqrt() * MEAN)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def alphas_of(log_snrs: Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-log_snrs.double().numpy()))


def test_the_denoiser_of_these_tests_is_the_reference() -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for level in (-5.0, 0.0, 5.0):
        ours = best_denoiser(z, torch.tensor(level, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(ours, gaussian.best_denoiser(z.numpy(), 1 / (1 + np.exp(-level)), MEAN, STD))


def flow_error(sampler: Callable[..., Tensor], steps: int) -> float:
    """Largest distance from the exact flow over log SNR -6 .. 6, in equal steps of log SNR."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    log_snrs = torch.linspace(-6, 6, steps + 1)
    found = sampler(best_denoiser, z, log_snrs, generators(1)).numpy()
    a = alphas_of(log_snrs)
    return float(np.abs(found - gaussian.exact_flow(z.numpy(), a[0], a[-1], MEAN, STD)).max())


@pytest.mark.parametrize(
    ("sampler", "order", "low", "high"),
    [(sample_ddim, 2, 1.9, 2.1), (sample_heun, 4, 3.7, 4.3), (sample_dpmpp, 4, 3.6, 4.4)],
    ids=["ddim halves", "heun quarters", "dpm++ quarters"],
)
def test_error_falls_with_the_samplers_order_when_steps_double(
    sampler: Callable[..., Tensor], order: int, low: float, high: float
) -> None:
    errors = [flow_error(sampler, steps) for steps in (80, 160, 320)]
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    # The next power of the step width is what separates the ratio from the order; it halves with each doubling.
    assert all(low < ratio < high for ratio in ratios), ratios
    assert abs(ratios[1] - order) <= abs(ratios[0] - order) + 0.02, ratios


@pytest.mark.parametrize("sampler", [sample_ddim, sample_heun, sample_dpmpp])
def test_few_steps_even_in_time_of_a_cosine_stay_near_the_flow(sampler: Callable[..., Tensor]) -> None:
    """The first step spans a ratio of noise levels of 10^3, which must not amplify anything."""
    log_snrs = log_snr_grid(CosineSchedule(), 10)
    z = torch.linspace(-2, 2, 9).reshape(1, 1, 3, 3)
    found = sampler(best_denoiser, z, log_snrs, generators(1)).numpy()
    a = alphas_of(log_snrs)
    # DDIM, of first order, has 0.14
    assert np.abs(found - gaussian.exact_flow(z.double().numpy(), a[0], a[-1], MEAN, STD)).max() < 0.15


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_ddpm_draws_with_the_mean_and_variance_of_its_chain(steps: int) -> None:
    values = 40_000
    log_snrs = log_snr_grid(DiscreteSchedule(linear_betas(1e-4, 0.02, 1000)), steps)
    rng = generators(1, seed=steps)
    z = noise_like(torch.empty(1, 1, 200, 200), rng)
    drawn = sample_ddpm(best_denoiser, z, log_snrs, rng)
    mean, variance = gaussian.ddpm_moments(alphas_of(log_snrs), MEAN, STD)
    # 4 standard errors of a mean and of a variance
    assert abs(drawn.mean().item() - mean) < 4 * np.sqrt(variance / values)
    assert abs(drawn.var().item() - variance) < 4 * variance * np.sqrt(2 / values)


def test_ddpm_in_all_its_steps_draws_the_data() -> None:
    log_snrs = log_snr_grid(DiscreteSchedule(linear_betas(1e-4, 0.02, 1000)), 1000)
    mean, variance = gaussian.ddpm_moments(alphas_of(log_snrs), MEAN, STD)
    # The chain starts at N(0, 1) where q(z_T) has the mean sqrt(alpha_T) MEAN = 0.002, and the posterior's variance
    # leaves out the uncertainty of x: Ho et al. (2020) sec. 3.2. In 1000 steps that is 1.6 % of the variance.
    assert mean == pytest.approx(MEAN, abs=3e-3)
    assert variance == pytest.approx(STD**2, rel=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_one_point_data_is_exact_at_any_number_of_steps(sampler: Callable[..., Tensor], steps: int) -> None:
    point = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    rng = generators(1)
    drawn = sampler(lambda _z, _log_snr: point, noise_like(point, rng), log_snr_grid(CosineSchedule(), steps), rng)
    assert torch.equal(drawn, point)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clip", [(-11.0, 12.0), (-20.0, 20.0)])
@pytest.mark.parametrize("spacing", ["t", "log_snr"])
def test_the_last_step_ends_at_x_as_algorithm_18_2_does_wherever_the_schedule_is_clipped(
    sampler: Callable[..., Tensor], clip: tuple[float, float], spacing: str
) -> None:
    seen: list[Tensor] = []
    rng = generators(2)
    z, log_snrs = noise_like(torch.empty(2, 3, 4, 4), rng), log_snr_grid(CosineSchedule(clip=clip), 6, spacing)
    drawn = sampler(best_denoiser, z, log_snrs, rng, lambda _step, x_hat: seen.append(x_hat))
    assert torch.equal(drawn, seen[-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(sampler: Callable[..., Tensor]) -> None:
    log_snrs = log_snr_grid(CosineSchedule(), 6)

    def draw(seeds: list[int]) -> Tensor:
        rng = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampler(best_denoiser, noise_like(torch.empty(len(seeds), 3, 4, 4), rng), log_snrs, rng)

    assert torch.equal(draw([3, 4, 5])[1:2], draw([4]))


def test_ddim_at_eta_one_adds_the_noise_of_ddpm() -> None:
    """Same mean, variance and noise in every step but the last, where DDPM adds none and neither does DDIM."""
    log_snrs = torch.linspace(-6, 6, 13)
    z = noise_like(torch.empty(1, 3, 8, 8), generators(1, seed=9))
    ddpm = sample_ddpm(best_denoiser, z.double(), log_snrs, generators(1))
    ddim = sample_ddim(best_denoiser, z.double(), log_snrs, generators(1), eta=1.0)
    at_end = best_denoiser(ddpm, log_snrs[-1]).sub(best_denoiser(ddim, log_snrs[-1])).abs().max()
    # They part in the last step only, by less than the noise that is left at log SNR 6: e^-3 = 0.05, times 4.
    assert at_end < 0.2
    # With the last level clean nothing is left to part them; the rest is float32 in the coefficients.
    clean = torch.cat([log_snrs, torch.tensor([CLEAN])])
    ddpm = sample_ddpm(best_denoiser, z.double(), clean, generators(1))
    ddim = sample_ddim(best_denoiser, z.double(), clean, generators(1), eta=1.0)
    torch.testing.assert_close(ddpm, ddim, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 1e-4, 0.02), (4, 0.1, 0.4), (1, 0.5, 0.5)])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_over_all_steps_is_algorithm_18_2(steps: int, first: float, last: float, variance: str) -> None:
    schedule = DiscreteSchedule(linear_betas(first, last, steps))
    start = noise_like(torch.empty(1, 3, 4, 4), generators(1, seed=5))
    noise_rng = generators(1)
    noise = [noise_like(start, noise_rng).double().numpy() for _ in range(steps - 1)]
    betas = chapter18.linear_betas(steps, first, last) if steps > 1 else np.array([first])
    step_of = {round(float(level), 4): step for step, level in enumerate(schedule.table.float())}

    def toy_eps(z: np.ndarray, t: int) -> np.ndarray:
        """The noise beside a bounded x_hat that differs from step to step."""
        a = chapter18.alphas(betas)[t - 1]
        return (z - np.sqrt(a) * np.tanh(z + 0.2 * np.sin(t))) / np.sqrt(1 - a)

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        eps = torch.from_numpy(toy_eps(z.numpy(), step_of[round(log_snr.item(), 4)]))
        return to_x("eps", eps, z, log_snr)

    drawn = sample_ddpm(
        denoise,
        start.double(),
        log_snr_grid(schedule, steps),
        generators(1),
        variance=variance,  # type: ignore[arg-type]
    )
    expected = chapter18.sample_18_2(toy_eps, start.double().numpy(), betas, noise, variance == "beta")
    # The levels are float32, each step's share of z is right to 1e-6, and most of z is replaced within 100 steps.
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=0, atol=1e-4 if steps == 1000 else 3e-6)


def test_large_variance_is_beta() -> None:
    log_snrs = torch.tensor([-1.0, 1.0, CLEAN])
    z = torch.zeros(1, 1, 100, 100)
    seen: list[Tensor] = []

    def denoise(z: Tensor, _: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros_like(z)

    sample_ddpm(denoise, z, log_snrs, generators(1), variance="beta")
    a = alphas_of(log_snrs)
    # 4 standard errors of a variance over 10^4 values
    assert seen[1].var().item() == pytest.approx(1 - a[0] / a[1], rel=4 * np.sqrt(2e-4))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_logarithm_of_a_variance_between_lies_a_share_gamma_of_the_way_from_the_posteriors_to_betas(
    gamma: float,
) -> None:
    log_snrs = torch.tensor([-1.0, 1.0, 1.0, CLEAN])  # a step of no length adds no noise
    seen: list[Tensor] = []

    def denoise(z: Tensor, _: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros_like(z)

    z = torch.zeros(1, 1, 200, 200)
    sample_ddpm(denoise, z, log_snrs, generators(1), variance="between", gamma=gamma)
    a = alphas_of(log_snrs)
    beta = 1 - a[0] / a[1]
    posterior = beta * (1 - a[1]) / (1 - a[0])  # 4.4 times smaller
    # 4 standard errors of a variance over 4 * 10^4 values
    assert seen[1].var().item() == pytest.approx(posterior ** (1 - gamma) * beta**gamma, rel=4 * np.sqrt(0.5e-4))
    assert torch.equal(seen[2], seen[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_watcher_sees_every_step_and_its_x_hat(sampler: Callable[..., Tensor]) -> None:
    seen: list[tuple[int, Tensor]] = []
    z = torch.ones(2, 1, 2, 2)
    sampler(
        lambda z, _: torch.full_like(z, 0.25),
        z,
        torch.linspace(-3, 3, 6),
        generators(2),
        lambda *step: seen.append(step),
    )
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert all(torch.equal(x_hat, torch.full_like(z, 0.25)) for _, x_hat in seen)


@pytest.mark.parametrize(
    ("sampler", "calls"), [(sample_ddpm, 5), (sample_ddim, 5), (sample_heun, 9), (sample_dpmpp, 5)]
)
def test_network_is_called_once_a_step_and_by_heun_twice_in_all_but_the_last(
    sampler: Callable[..., Tensor], calls: int
) -> None:
    levels: list[float] = []

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        assert log_snr.shape == (2, 1, 1, 1)
        levels.append(log_snr[0].item())
        return z

    sampler(denoise, torch.ones(2, 1, 2, 2), torch.linspace(-3, 3, 6), generators(2))
    assert len(levels) == calls


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_of_no_length_at_the_ends_of_a_clipped_schedule_change_nothing(sampler: Callable[..., Tensor]) -> None:
    log_snrs = log_snr_grid(CosineSchedule(clip=(-9.0, 12.0)), 1000)
    assert int((log_snrs.diff() == 0).sum()) > 2
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    rest = torch.unique_consecutive(log_snrs)
    found, expected = (sampler(best_denoiser, z, levels, generators(1)) for levels in (log_snrs, rest))
    if sampler is sample_ddpm:  # its noise is drawn step by step, also for a step of no length
        assert found.isfinite().all()
    else:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # the one-step-later start of the second order


@pytest.mark.parametrize("apart", [0.0, 3e-16, 1e-7, 1e-4])
@pytest.mark.parametrize("rounding", [0.0, 4e-3])
def test_two_levels_that_all_but_coincide_cost_dpmpp_at_most_a_step_of_first_order(
    apart: float, rounding: float
) -> None:
    """Without a guard the difference of two x_hat, rounded as in bfloat16, is divided by nothing."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    even = torch.linspace(-6, 6, 25, dtype=torch.float64)
    doubled = torch.cat([even[:13], even[12:13] + apart, even[13:]])
    sign = iter([1, -1] * 20)
    found = sample_dpmpp(lambda z, level: best_denoiser(z, level) + rounding * next(sign), z, doubled, generators(1))
    a = alphas_of(even)
    error = np.abs(found.numpy() - gaussian.exact_flow(z.numpy(), a[0], a[-1], MEAN, STD)).max()
    first_order = sample_ddim(best_denoiser, z, even, generators(1)).numpy()
    of_first_order = np.abs(first_order - gaussian.exact_flow(z.numpy(), a[0], a[-1], MEAN, STD)).max()
    assert error < of_first_order + 2 * rounding
