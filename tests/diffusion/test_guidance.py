"""Guidance rules and composed conditions, against closed forms on Gaussian data."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cascade.diffusion.denoisers import guide, linear
from cascade.diffusion.guidance import (
    Part,
    Projected,
    autoguide,
    by_level,
    chain,
    coefficients,
    compose,
    rescaled,
    switch,
    within,
)
from cascade.diffusion.noise import Denoiser, alpha, diffuse, one_minus_alpha, predicted_eps
from cascade.diffusion.samplers import sample_ddim

SIZE = (2, 3, 4, 4)


@dataclass(frozen=True)
class Gaussian:
    """A condition under which every value is N(mean, variance); its own batch's values are equal."""

    mean: float
    variance: float = 0.04

    def joined(self, _other: Gaussian) -> Gaussian:
        raise AssertionError("each condition is a call of its own")


@dataclass
class Exact:
    """The best denoiser of Gaussian data: E[x | z]."""

    calls: list[float] = field(default_factory=list)

    def prepare(self, cond: Gaussian) -> Denoiser:
        def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
            self.calls.append(cond.mean)
            a, noise = alpha(log_snr), one_minus_alpha(log_snr)
            gain = a.sqrt() * cond.variance / (a * cond.variance + noise)
            return cond.mean + gain * (z - a.sqrt() * cond.mean)

        return denoise


def noisy(seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level(value: float) -> Tensor:
    return torch.full((2, 1, 1, 1), value, dtype=torch.float64)


def estimate(cond: Gaussian, z: Tensor, value: float) -> Tensor:
    return Exact().prepare(cond)(z, level(value))


RED, BLUE, NULL = Gaussian(-0.5), Gaussian(0.7, 0.09), Gaussian(0.1, 0.5)


def test_one_part_of_weight_one_is_guidance() -> None:
    composed = compose(Exact(), [Part(RED)], [Part(NULL)], linear(3.0))
    z = noisy()
    x_null = estimate(NULL, z, -1.0)
    torch.testing.assert_close(composed(z, level(-1.0)), x_null + 3.0 * (estimate(RED, z, -1.0) - x_null))


def test_composed_scores_are_those_of_the_product_of_densities() -> None:
    """Liu et al. (2022) eq. 11: the score of p(z) prod (p(z | c_i) / p(z))^(w_i), in closed form for Gaussians."""
    weights, z, value = (1.2, 0.8), noisy(), 0.3
    a, noise = alpha(level(value)), one_minus_alpha(level(value))

    def score(cond: Gaussian) -> Tensor:
        return -(z - a.sqrt() * cond.mean) / (a * cond.variance + noise)

    expected = score(NULL) + sum(w * (score(c) - score(NULL)) for w, c in zip(weights, (RED, BLUE), strict=True))
    parts = [Part(RED, weights[0]), Part(BLUE, weights[1])]
    x_hat = compose(Exact(), parts, [Part(NULL)], linear(1.0))(z, level(value))
    torch.testing.assert_close(predicted_eps(x_hat, z, level(value)), -noise.sqrt() * expected)


def test_outside_the_interval_the_parts_are_averaged_and_the_null_text_is_not_read() -> None:
    model = Exact()
    composed = compose(model, [Part(RED, 3.0), Part(BLUE, 1.0), Part(NULL, -1.0)], [Part(NULL)], linear(4.0), (-2, 0))
    z = noisy()
    expected = 0.75 * estimate(RED, z, 1.0) + 0.25 * estimate(BLUE, z, 1.0)
    torch.testing.assert_close(composed(z, level(1.0)), expected)
    assert len(model.calls) == 3


def test_several_negative_prompts_are_averaged_by_weight() -> None:
    z = noisy()
    composed = compose(Exact(), [Part(RED)], [Part(BLUE, 1.0), Part(NULL, 3.0)], linear(2.0))
    away = 0.25 * estimate(BLUE, z, -1.0) + 0.75 * estimate(NULL, z, -1.0)
    torch.testing.assert_close(composed(z, level(-1.0)), away + 2.0 * (estimate(RED, z, -1.0) - away))


def test_regions_draw_each_from_its_own_distribution() -> None:
    """Weights that are 0 or 1 in each pixel: the exact flow ends in each region's own Gaussian."""
    left = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    left[..., :2] = 1
    certain = Gaussian(-0.5, 0.0), Gaussian(0.7, 0.0)
    parts = [Part(cond, mask) for cond, mask in zip(certain, (left, 1 - left), strict=True)]
    denoise = compose(Exact(), parts, [Part(NULL)], None)
    rng = [torch.Generator() for _ in range(2)]
    x = sample_ddim(denoise, noisy(), torch.linspace(-10, 12, 9), rng)
    torch.testing.assert_close(x, (-0.5 * left + 0.7 * (1 - left)).expand(SIZE).contiguous(), rtol=0, atol=0.01)


def test_a_switch_takes_over_at_its_level() -> None:
    def constant(value: float) -> Denoiser:
        return lambda z, _: torch.full_like(z, value)

    switched = switch([(-5.0, constant(1.0)), (0.0, constant(2.0)), (3.0, constant(3.0))])
    found = [float(switched(noisy(), level(value))[0, 0, 0, 0]) for value in (-9.0, -5.0, -0.1, 0.0, 2.9, 3.0, 9.0)]
    assert found == [1, 1, 1, 2, 2, 3, 3]


def test_a_region_alone_is_seen_in_the_middle_of_white_and_its_result_is_put_back() -> None:
    seen: list[Tensor] = []

    def look(z: Tensor, _: Tensor) -> Tensor:
        seen.append(z)
        return z

    mask = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    mask[0, :, :4, :4], mask[1, :, 2:6, 4:] = 1, 1
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x_hat = within(look, mask, eps)(z, level(0.5))
    torch.testing.assert_close(x_hat * mask, z * mask, rtol=0, atol=1e-15)
    torch.testing.assert_close(seen[0][:, :, 2:6, 2:6], torch.stack([z[0, :, :4, :4], z[1, :, 2:6, 4:]]))
    white = diffuse(torch.ones_like(z), eps, level(0.5))
    torch.testing.assert_close(x_hat * (1 - mask), white * (1 - mask), rtol=0, atol=1e-15)


# --- rules ---------------------------------------------------------------------------------------------------------


def two(seed: int = 3) -> tuple[Tensor, Tensor]:
    return noisy(seed), noisy(seed + 1)


def test_projected_guidance_without_its_three_means_is_guidance() -> None:
    x_cond, x_null = two()
    found = Projected(3.0, parallel=1.0)(x_cond, x_null, level(0.0))
    torch.testing.assert_close(found, linear(3.0)(x_cond, x_null, level(0.0)))


def test_projected_guidance_adds_nothing_along_the_guided_picture() -> None:
    x_cond, x_null = two()
    added = Projected(7.0)(x_cond, x_null, level(0.0)) - x_cond
    torch.testing.assert_close(
        (added * x_cond).sum(dim=(1, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert added.abs().max() > 0.1


def test_the_radius_bounds_the_update_of_each_picture() -> None:
    x_cond, x_null = two()
    x_null[1] = x_cond[1] + 0.01
    added = Projected(2.0, parallel=1.0, radius=0.2)(x_cond, x_null, level(0.0)) - x_cond
    size = added.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(size, torch.tensor([0.2, 0.01], dtype=torch.float64))


def test_momentum_adds_the_earlier_updates_of_one_generation() -> None:
    rule = Projected(2.0, parallel=1.0, momentum=-0.5)
    updates = [noisy(seed) for seed in range(3)]
    zero = torch.zeros(SIZE, dtype=torch.float64)
    found = [rule(update, zero, level(0.0)) - update for update in updates]
    torch.testing.assert_close(found[2], updates[2] - 0.5 * updates[1] + 0.25 * updates[0])


def test_rescaling_gives_back_the_contrast_of_the_unguided_picture() -> None:
    x_cond, x_null = two()
    strong = linear(8.0)
    std = x_cond.std(dim=(1, 2, 3))
    torch.testing.assert_close(rescaled(strong, 1.0)(x_cond, x_null, level(0.0)).std(dim=(1, 2, 3)), std)
    expected = 0.3 * std + 0.7 * strong(x_cond, x_null, level(0.0)).std(dim=(1, 2, 3))
    torch.testing.assert_close(rescaled(strong, 0.3)(x_cond, x_null, level(0.0)).std(dim=(1, 2, 3)), expected)


@pytest.mark.parametrize(
    ("value", "factor"), [(-9.0, 0.0), (-2.0, 0.0), (-1.0, 0.5), (0.0, 1.0), (4.0, 0.6), (9.0, 0.2)]
)
def test_a_schedule_interpolates_the_weight_in_log_snr(value: float, factor: float) -> None:
    x_cond, x_null = two()
    rule = by_level([(-2.0, 0.0), (0.0, 1.0), (8.0, 0.2)], 5.0)
    expected = linear(1 + 4 * factor)(x_cond, x_null, level(value))
    torch.testing.assert_close(rule(x_cond, x_null, level(value)), expected)


def test_guidance_away_from_a_blurrier_model_sharpens_the_distribution() -> None:
    """Karras et al. (2024): data N(m, s^2), a weaker model that believes in a larger variance; the spread shrinks."""

    class Weak(Exact):
        def prepare(self, cond: Gaussian) -> Denoiser:
            return super().prepare(Gaussian(cond.mean, 4 * cond.variance))

    rng = [torch.Generator() for _ in range(2)]
    z = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(-10, 10, 61)
    plain = sample_ddim(autoguide(Exact(), Weak(), RED, 1.0), z, levels, rng)
    guided = sample_ddim(autoguide(Exact(), Weak(), RED, 2.0), z, levels, rng)
    assert abs(float(plain.std()) - 0.2) < 0.01  # 60 steps of first order; 6,144 values
    assert float(guided.std()) < 0.9 * float(plain.std())
    assert abs(float(guided.mean()) + 0.5) < 0.02


def test_a_rule_serves_guide_as_a_weight_does() -> None:
    class Joined(Gaussian):
        def joined(self, _other: Gaussian) -> Gaussian:
            return self

    class Halves(Exact):
        def prepare(self, _cond: Gaussian) -> Denoiser:
            return lambda z, log_snr: torch.cat(
                [estimate(RED, z[:2], float(log_snr[0])), estimate(NULL, z[2:], float(log_snr[0]))]
            )

    z = noisy()
    by_rule = guide(Halves(), Joined(0.0), NULL, linear(2.5))(z, level(-1.0))
    assert torch.equal(by_rule, guide(Halves(), Joined(0.0), NULL, 2.5)(z, level(-1.0)))


# --- a weight for each of several conditions ------------------------------------------------------------------


def test_chained_guidance_of_gaussian_data_shifts_the_mean_by_the_weighted_steps() -> None:
    """E[x | z] is affine in the mean for one variance, so eq. 3 is exact guidance towards one Gaussian."""
    means, weights = (0.1, 0.3, -0.2, 0.6), (2.0, 0.5, 3.0)
    conds = [Gaussian(mean) for mean in means]
    steps = [after - before for before, after in pairwise(means)]
    shifted = Gaussian(means[0] + sum(weight * step for weight, step in zip(weights, steps, strict=True)))
    z, log_snrs = noisy(), torch.linspace(-12, 12, 400, dtype=torch.float64)
    rng = [torch.Generator()] * 2
    drawn = sample_ddim(chain(Exact(), conds, weights), z, log_snrs, rng)
    assert torch.allclose(drawn, sample_ddim(Exact().prepare(shifted), z, log_snrs, rng), atol=1e-12)
    # The exact flow keeps z's distance from the mean in standard deviations, here of unit noise.
    assert torch.allclose(drawn, shifted.mean + shifted.variance**0.5 * z, atol=2e-2)  # 400 steps


def test_chained_guidance_is_the_usual_one_for_equal_weights_and_two_conditions() -> None:
    conds = [Gaussian(0.1), Gaussian(0.5), Gaussian(-0.3)]
    z, at = noisy(), level(0.5)
    usual = torch.lerp(Exact().prepare(conds[0])(z, at), Exact().prepare(conds[2])(z, at), 3.0)
    model = Exact()
    assert torch.allclose(chain(model, conds, (3.0, 3.0))(z, at), usual, atol=1e-12)
    assert model.calls == [0.1, -0.3]  # a factor of zero needs no call
    assert coefficients((3.0, 3.0)) == [-2.0, 0.0, 3.0]
    assert torch.equal(chain(Exact(), conds, (1.0, 1.0))(z, at), Exact().prepare(conds[2])(z, at))
    outside = chain(Exact(), conds, (5.0, 2.0), interval=(1.0, 2.0))
    assert torch.equal(outside(z, at), Exact().prepare(conds[2])(z, at))
