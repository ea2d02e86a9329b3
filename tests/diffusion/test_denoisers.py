"""Guidance on a mixture of Gaussians, thresholding, and the change between picture and residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from reference import gaussian
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.diffusion.denoisers import clip, guide, quantile_of_rows, threshold, to_picture, to_residual
from cascade.diffusion.noise import Denoiser, alpha, noise_like, predicted_eps
from cascade.diffusion.samplers import sample_ddim

MEANS, STD = np.array([-0.6, 0.6]), 0.2
NULL = -1


def text(*classes: int) -> Conditioning:
    """Conditions whose only token holds the class: 0, 1, or NULL for the whole mixture."""
    tokens = torch.tensor(classes, dtype=torch.float32)[:, None, None]
    return Conditioning(tokens, torch.ones(len(classes), 1, dtype=torch.bool))


@dataclass
class Mixture:
    """The best denoiser of x ~ an equal mixture of N(MEANS[k], STD^2), given its class or nothing."""

    batches: list[int] = field(default_factory=list)
    prepared: int = 0

    def prepare(self, cond: Conditioning) -> Denoiser:
        classes = cond.text[:, 0, 0].long().tolist()
        self.prepared += 1

        def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
            self.batches.append(len(z))
            shares = alpha(log_snr.double()).flatten().tolist()
            rows = [
                gaussian.mixture_denoiser(z[i].double().numpy(), a, MEANS if k == NULL else MEANS[[k]], STD)
                for i, (k, a) in enumerate(zip(classes, shares, strict=True))
            ]
            return torch.from_numpy(np.stack(rows)).to(z.dtype)

        return denoise


def level(value: float, count: int = 2) -> Tensor:
    return torch.full((count, 1, 1, 1), value)


def noisy(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def x_given(*classes: int, log_snr: float = -1.0) -> Tensor:
    return Mixture().prepare(text(*classes))(noisy(len(classes)), level(log_snr, len(classes)))


def test_guidance_in_x_is_guidance_in_eps() -> None:
    z, log_snr = noisy(), level(-1.0).double()
    x = guide(Mixture(), text(0, 1), text(NULL, NULL), 3.0)(z, log_snr)
    eps_cond = predicted_eps(x_given(0, 1), z, log_snr)
    eps_null = predicted_eps(x_given(NULL, NULL), z, log_snr)
    torch.testing.assert_close(predicted_eps(x, z, log_snr), eps_null + 3.0 * (eps_cond - eps_null))


def test_guidance_follows_the_gradient_of_the_class_probability() -> None:
    """Ho & Salimans (2022) sec. 3: the score of p(z | c) (p(z | c) / p(z))^(w - 1), here by finite differences."""
    z, a, weight, h = np.linspace(-1.5, 1.5, 48).reshape(1, 3, 4, 4), 1 / (1 + np.e), 2.5, 1e-5

    def log_p(z: np.ndarray, classes: list[int]) -> np.ndarray:
        variance = a * STD**2 + 1 - a
        return np.log(np.mean([np.exp(-((z - np.sqrt(a) * MEANS[k]) ** 2) / 2 / variance) for k in classes], axis=0))

    def log_guided(z: np.ndarray) -> np.ndarray:
        return log_p(z, [0]) + (weight - 1) * (log_p(z, [0]) - log_p(z, [0, 1]))

    score = (log_guided(z + h) - log_guided(z - h)) / (2 * h)
    x = guide(Mixture(), text(0), text(NULL), weight)(torch.from_numpy(z), level(-1.0, 1).double())
    # eps = -sqrt(1 - alpha) score; central differences of step 1e-5 in float64 are good to 1e-9
    eps = predicted_eps(x, torch.from_numpy(z), level(-1.0, 1).double()).numpy()
    np.testing.assert_allclose(eps, -np.sqrt(1 - a) * score, rtol=0, atol=1e-6)


def test_weight_one_is_no_guidance_and_costs_one_evaluation() -> None:
    model = Mixture()
    x = guide(model, text(0, 1), text(NULL, NULL), 1.0)(noisy(), level(-1.0))
    torch.testing.assert_close(x, x_given(0, 1), rtol=0, atol=0)
    assert model.batches == [2]


def test_weight_zero_is_the_null_text() -> None:
    x = guide(Mixture(), text(0, 1), text(NULL, NULL), 0.0)(noisy(), level(-1.0))
    torch.testing.assert_close(x, x_given(NULL, NULL), rtol=0, atol=0)


def test_both_halves_go_in_one_batch_prepared_once() -> None:
    model = Mixture()
    denoise = guide(model, text(0, 1), text(NULL, NULL), 2.0)
    for value in (-2.0, 0.0, 2.0):
        denoise(noisy(), level(value))
    assert model.batches == [4, 4, 4]
    assert model.prepared == 1


def test_each_picture_may_have_its_own_weight() -> None:
    weights = torch.tensor([1.0, 4.0], dtype=torch.float64)[:, None, None, None]
    x = guide(Mixture(), text(0, 1), text(NULL, NULL), weights)(noisy(), level(-1.0))
    cond, null = x_given(0, 1), x_given(NULL, NULL)
    torch.testing.assert_close(x[0], cond[0])
    torch.testing.assert_close(x[1], null[1] + 4.0 * (cond[1] - null[1]))


def test_guidance_acts_within_its_interval_only() -> None:
    model = Mixture()
    within = guide(model, text(0, 1), text(NULL, NULL), 2.0, interval=(-2.0, 3.0))
    always = guide(Mixture(), text(0, 1), text(NULL, NULL), 2.0)
    for value, acts in [(-2.5, False), (-2.0, True), (0.0, True), (3.0, True), (3.5, False)]:
        model.batches.clear()
        expected = always(noisy(), level(value)) if acts else x_given(0, 1, log_snr=value)
        torch.testing.assert_close(within(noisy(), level(value)), expected, rtol=0, atol=0)
        assert model.batches == [4 if acts else 2]


def test_a_negative_prompt_takes_the_place_of_the_null_text() -> None:
    x = guide(Mixture(), text(1, 1), text(0, 0), 2.0)(noisy(), level(-1.0))
    away = x_given(0, 0)
    torch.testing.assert_close(x, away + 2.0 * (x_given(1, 1) - away))


def test_unguided_sampling_draws_the_class_and_guidance_moves_away_from_the_other() -> None:
    rng = [torch.Generator().manual_seed(index) for index in range(2)]
    z = noise_like(torch.empty(2, 1, 32, 32), rng)
    log_snrs = torch.linspace(-10, 10, 41)
    plain = sample_ddim(guide(Mixture(), text(0, 1), text(NULL, NULL), 1.0), z, log_snrs, rng)
    guided = sample_ddim(guide(Mixture(), text(0, 1), text(NULL, NULL), 3.0), z, log_snrs, rng)
    # 4 standard errors over 1024 values, and 5 % for 40 steps of first order
    np.testing.assert_allclose(plain.mean(dim=(1, 2, 3)), MEANS, rtol=0, atol=4 * STD / 32 + 0.03)
    assert guided[0].mean() < plain[0].mean()
    assert guided[1].mean() > plain[1].mean()


def test_wider_null_text_than_prompt_is_padded() -> None:
    long = Conditioning(torch.full((2, 3, 1), float(NULL)), torch.ones(2, 3, dtype=torch.bool))
    x = guide(Mixture(), text(0, 1), long, 2.0)(noisy(), level(-1.0))
    torch.testing.assert_close(x, guide(Mixture(), text(0, 1), text(NULL, NULL), 2.0)(noisy(), level(-1.0)))


def constant(x: Tensor) -> Denoiser:
    return lambda _z, _log_snr: x


PICTURES = torch.cat([0.5 * torch.ones(1, 3, 4, 4), torch.linspace(-3, 3, 48).reshape(1, 3, 4, 4)])


def test_static_clip_keeps_the_picture_in_range() -> None:
    clipped = clip(constant(PICTURES))(PICTURES, level(0.0))
    np.testing.assert_array_equal(clipped.numpy(), np.clip(PICTURES.numpy(), -1, 1))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
@pytest.mark.parametrize("maximum", [float("inf"), 1.5])
def test_dynamic_threshold_is_imagens_formula(quantile: float, maximum: float) -> None:
    found = threshold(constant(PICTURES), quantile, maximum)(PICTURES, level(0.0)).numpy()
    for x, result in zip(PICTURES.numpy(), found, strict=True):
        s = min(max(np.quantile(np.abs(x), quantile), 1.0), maximum)
        np.testing.assert_allclose(result, np.clip(x, -s, s) / s, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 12_345])
@pytest.mark.parametrize("quantile", [0.001, 0.25, 0.5, 0.995, 0.9999999999])
def test_the_quantile_is_that_of_torch_in_every_bit(count: int, quantile: float) -> None:
    values = torch.rand(3, count, generator=torch.Generator().manual_seed(count))
    assert torch.equal(quantile_of_rows(values, quantile), torch.quantile(values, quantile, dim=1))


@pytest.mark.parametrize("quantile", [0.25, 0.995])
def test_a_row_with_a_nan_has_no_quantile_and_leaves_the_others_theirs(quantile: float) -> None:
    values = torch.rand(3, 100)
    values[1, 7] = torch.nan
    expected = torch.quantile(values, quantile, dim=1)
    assert expected.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(quantile_of_rows(values, quantile), expected, rtol=0, atol=0, equal_nan=True)


def test_the_quantile_takes_pictures_larger_than_torch_does() -> None:
    values = torch.arange(2**24 + 9, dtype=torch.float32).flip(0)[None] / 2**24
    assert quantile_of_rows(values, 0.25).item() == pytest.approx(0.25, abs=1e-6)


def test_dynamic_threshold_leaves_a_picture_within_range_alone() -> None:
    assert torch.equal(threshold(constant(PICTURES), 0.995)(PICTURES, level(0.0))[0], PICTURES[0])


BASE = torch.linspace(-0.9, 0.9, 96).reshape(2, 3, 4, 4)


def test_to_residual_inverts_to_picture() -> None:
    residual = constant(PICTURES)
    there_and_back = to_residual(to_picture(residual, BASE, 0.25), BASE, 0.25)
    torch.testing.assert_close(there_and_back(PICTURES, level(0.0)), PICTURES)
    torch.testing.assert_close(to_picture(residual, BASE, 0.25)(PICTURES, level(0.0)), BASE + 0.25 * PICTURES)


@pytest.mark.parametrize("limited", [clip, lambda denoise: threshold(denoise, 0.9)], ids=["clip", "threshold"])
def test_limits_on_a_residual_act_on_the_picture(limited: Callable[[Denoiser], Denoiser]) -> None:
    picture = to_picture(constant(PICTURES), BASE, 0.25)
    residual = to_residual(limited(picture), BASE, 0.25)(PICTURES, level(0.0))
    expected = limited(constant(BASE + 0.25 * PICTURES))(PICTURES, level(0.0))
    torch.testing.assert_close(BASE + 0.25 * residual, expected)
    assert (BASE + 0.25 * residual).abs().max() <= 1 + 1e-6
    assert residual.abs().max() > 1
