"""eps, v, x and velocity are equivalent."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from helpers_diffusion import from_x

from cascade.diffusion.noise import Prediction, alpha, diffuse, log_weight_in_x, one_minus_alpha, target, to_x

KINDS: tuple[Prediction, ...] = get_args(Prediction)
LEVELS = [-8.0, -2.0, 0.0, 3.0, 8.0]


def problem(log_snr: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, eps, z, level in float64, so that only the algebra is tested."""
    rng = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    level = torch.full((2, 1, 1, 1), log_snr, dtype=torch.float64)
    return x, eps, diffuse(x, eps, level), level


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_snr", LEVELS)
def test_the_target_stands_for_x(kind: Prediction, log_snr: float) -> None:
    x, eps, z, level = problem(log_snr)
    torch.testing.assert_close(to_x(kind, target(kind, x, eps, level), z, level), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_snr", LEVELS)
def test_from_x_inverts_to_x(kind: Prediction, log_snr: float) -> None:
    _, output, z, level = problem(log_snr)
    torch.testing.assert_close(from_x(kind, to_x(kind, output, z, level), z, level), output)


@pytest.mark.parametrize("kind", ["x", "v", "velocity"])
@pytest.mark.parametrize("log_snr", [-20.0, 20.0])
def test_bounded_parameterizations_keep_float32_accuracy_at_the_ends(kind: Prediction, log_snr: float) -> None:
    x, eps, _, level = (tensor.float() for tensor in problem(log_snr))
    z = diffuse(x, eps, level)
    torch.testing.assert_close(to_x(kind, target(kind, x, eps, level), z, level), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_snr", LEVELS)
def test_square_in_any_space_is_a_weighted_square_in_x(kind: Prediction, log_snr: float) -> None:
    x, eps, z, level = problem(log_snr)
    x_hat = x + 0.1 * torch.sin(7 * x)
    square = (target(kind, x, eps, level) - from_x(kind, x_hat, z, level)).square()
    torch.testing.assert_close(square, log_weight_in_x(kind, level).exp() * (x - x_hat).square())


def test_velocity_is_the_slope_of_the_straight_path_after_rescaling() -> None:
    x, eps, z, level = problem(1.3)
    signal, noise = alpha(level).sqrt(), one_minus_alpha(level).sqrt()
    t = noise / (signal + noise)
    torch.testing.assert_close(z / (signal + noise), (1 - t) * x + t * eps)
    torch.testing.assert_close(target("velocity", x, eps, level), eps - x)
