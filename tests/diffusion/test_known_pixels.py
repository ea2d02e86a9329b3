"""Known pixels and pictures to start from, where the answer is known: Gaussian data, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.diffusion.editing import Known, keep_known, levels_from, sample_repaint, see_known, start_from
from cascade.diffusion.noise import CLEAN, Denoiser, alpha, one_minus_alpha
from cascade.diffusion.samplers import sample_ddim, sample_ddpm, sample_heun
from cascade.diffusion.schedules import CosineSchedule, log_snr_grid

CORRELATION = 0.9
COUNT = 800
GRID = torch.cat([torch.linspace(-12, 12, 25), torch.tensor([CLEAN])])


def pair_denoiser() -> Denoiser:
    """The best denoiser of pictures of two pixels, each N(0, 1), with a correlation of 0.9: E[x | z]."""
    covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]])

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        a, noise = alpha(log_snr).flatten()[0], one_minus_alpha(log_snr).flatten()[0]
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + noise * torch.eye(2))
        return (z.flatten(1) @ gain.T).view(z.shape)

    return denoise


def rngs(count: int = COUNT) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def start() -> Tensor:
    return torch.randn(COUNT, 1, 1, 2, generator=torch.Generator().manual_seed(1))


KNOWN = torch.tensor([1.5, 0.0]).view(1, 1, 1, 2).expand(COUNT, 1, 1, 2)
MASK = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(COUNT, 1, 1, 2)
"""The left pixel is known to be 1.5; the right one is then N(0.9 * 1.5, 1 - 0.9^2)."""
MEAN, STD = CORRELATION * 1.5, (1 - CORRELATION**2) ** 0.5


def ignore(step: int, x_hat: Tensor) -> None: ...


def test_with_resampling_the_unknown_pixel_has_the_conditional_mean_and_spread() -> None:
    z = start_from(Known(KNOWN, MASK), KNOWN, start(), GRID[:1, None, None, None])
    x = sample_repaint(keep_known(pair_denoiser(), KNOWN, MASK), z, GRID, rngs(), ignore, rounds=8)
    assert torch.equal(x[..., 0], KNOWN[..., 0])
    error = 4 * STD / COUNT**0.5  # of a mean of so many samples, four times
    assert x[..., 1].mean().item() == pytest.approx(MEAN, abs=error + 0.03)
    assert x[..., 1].std().item() == pytest.approx(STD, abs=error + 0.03)


def test_each_round_brings_the_mean_nearer_to_the_conditional_one() -> None:
    """Without, the pixel that is drawn hears of its neighbour only through a noise that the neighbour does not need."""
    z = start_from(Known(KNOWN, MASK), KNOWN, start(), GRID[:1, None, None, None])
    means = [
        sample_repaint(keep_known(pair_denoiser(), KNOWN, MASK), z, GRID, rngs(), ignore, rounds)[..., 1].mean().item()
        for rounds in (1, 2, 8)
    ]
    distances = [abs(mean - MEAN) for mean in means]
    assert distances[0] > distances[1] > distances[2]


def test_one_round_is_ddpm() -> None:
    z, denoise = start()[:50], keep_known(pair_denoiser(), KNOWN[:50], MASK[:50])
    ours = sample_repaint(denoise, z, GRID, rngs(50), ignore, rounds=1)
    assert torch.allclose(ours, sample_ddpm(denoise, z, GRID, rngs(50)), atol=1e-5)


@pytest.mark.parametrize("sample", [sample_ddim, sample_ddpm, sample_heun])
def test_known_pixels_are_at_their_noise_level_at_every_step(sample: object) -> None:
    """Their z, less sqrt(alpha) x, has the variance 1 - alpha; and at the end they are the known ones in every bit."""
    seen: list[tuple[float, float]] = []
    inner = keep_known(pair_denoiser(), KNOWN, MASK)

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        left = (z - alpha(log_snr).sqrt() * KNOWN)[..., 0]
        seen.append((left.std().item(), one_minus_alpha(log_snr).flatten()[0].sqrt().item()))
        estimate = inner(z, log_snr)
        assert isinstance(estimate, Tensor)
        return estimate

    z = start_from(Known(KNOWN, MASK), KNOWN, start(), GRID[:1, None, None, None])
    x = sample(denoise, z, GRID, rngs())  # type: ignore[operator]
    assert torch.equal(x[..., 0], KNOWN[..., 0])
    for found, expected in seen:
        assert found == pytest.approx(expected, rel=0.1)  # the standard deviation of 800 samples


@pytest.mark.parametrize("sample", [sample_ddim, sample_ddpm, sample_heun])
def test_a_network_that_continues_clean_pixels_draws_the_conditional_distribution(sample: object) -> None:
    """The best denoiser for clean known pixels has x_right ~ N(0.9 x_left, 1 - 0.9^2) as its prior."""
    seen: list[bool] = []

    def continuing(z: Tensor, log_snr: Tensor) -> Tensor:
        seen.append(torch.equal(z[..., 0], KNOWN[..., 0]))
        a, noise = alpha(log_snr), one_minus_alpha(log_snr)
        left, right = z[..., :1], z[..., 1:]
        gain = STD**2 * a.sqrt() / (a * STD**2 + noise)
        return torch.cat([left, CORRELATION * left + gain * (right - a.sqrt() * CORRELATION * left)], dim=-1)

    x = sample(see_known(continuing, KNOWN, MASK), start(), GRID, rngs())  # type: ignore[operator]
    assert all(seen)
    error = 4 * STD / COUNT**0.5
    assert x[..., 1].mean().item() == pytest.approx(MEAN, abs=error + 0.03)
    assert x[..., 1].std().item() == pytest.approx(STD, abs=error + 0.05)  # of 25 steps


def test_a_soft_mask_lies_between() -> None:
    half = torch.full((1, 1, 1, 2), 0.5)
    x = torch.ones(1, 1, 1, 2)
    denoise = keep_known(lambda z, _: torch.zeros_like(z), x, half)
    estimate = denoise(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1))
    assert torch.equal(estimate, half)


def test_strength_says_at_which_time_the_picture_gets_its_noise() -> None:
    schedule = CosineSchedule()
    grid = log_snr_grid(schedule, 10)
    levels = levels_from(schedule, grid, 0.55)
    assert levels[0] == schedule.log_snr(torch.tensor([0.55], dtype=torch.float64)).float()
    assert torch.equal(levels[1:], grid[grid > levels[0]])
    assert torch.equal(levels_from(schedule, grid, 1.0), grid)
    assert torch.equal(levels_from(schedule, grid, 0.0), grid[-1:])


def test_strength_one_starts_from_noise_alone_and_less_from_the_picture() -> None:
    level = torch.tensor([1.0]).view(1, 1, 1, 1)
    eps = start()
    assert torch.equal(start_from(Known(KNOWN), KNOWN, eps, level), eps)
    less = start_from(Known(KNOWN, strength=0.5), KNOWN, eps, level)
    assert torch.allclose(less, alpha(level).sqrt() * KNOWN + one_minus_alpha(level).sqrt() * eps)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_the_distance_from_the_picture_is_that_of_its_noise(strength: float) -> None:
    """For x ~ N(0, 1) the flow of DDIM leaves z where it is, so the result is the noised picture: with x = 1.5 its mean
    square distance is (1 - sqrt(alpha))^2 1.5^2 + 1 - alpha, which grows with the strength."""
    schedule = CosineSchedule()
    x = torch.full((COUNT, 1, 1, 2), 1.5)
    levels = levels_from(schedule, log_snr_grid(schedule, 400), strength)
    z = start_from(Known(x, strength=strength), x, start(), levels[:1, None, None, None])

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        return alpha(log_snr).sqrt() * z

    drawn = sample_ddim(denoise, z, levels, rngs())
    a = alpha(levels[0])
    expected = (1 - a.sqrt()).square() * 1.5**2 + 1 - a
    assert (drawn - x).square().mean().item() == pytest.approx(expected.item(), rel=0.1)  # of 1,600 samples
