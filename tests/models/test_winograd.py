"""Convolutions with fewer multiplications: the same sums, and never those of old weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models import winograd
from cascade.models.winograd import Convolution, convolve, transform_kernel


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (10, 4)])
@pytest.mark.parametrize("band", [1, 200, 10**9], ids=["two rows", "some", "whole"])
def test_it_is_the_convolution(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], band: int) -> None:
    monkeypatch.setattr(winograd, "BAND_NUMBERS", band)
    h, weight, bias = numbers(2, 3, *size), numbers(5, 3, 3, 3, seed=1), numbers(5, seed=2)
    ours = convolve(h, transform_kernel(weight), bias)
    torch.testing.assert_close(ours, F.conv2d(h, weight, bias, padding=1), rtol=0, atol=1e-12)


def frozen(channels: int = winograd.LEAST_CHANNELS) -> Convolution:
    return Convolution(channels, channels, 3, padding=1).requires_grad_(False)


def is_transformed(convolution: Convolution, h: Tensor) -> bool:
    """Whether its sums are those of `convolve`, bit for bit."""
    assert convolution.bias is not None
    return torch.equal(convolution(h), convolve(h, transform_kernel(convolution.weight), convolution.bias))


def test_only_frozen_wide_ones_in_float32_at_even_sizes_are_transformed() -> None:
    torch.manual_seed(0)
    h = torch.randn(1, winograd.LEAST_CHANNELS, 8, 8)
    assert is_transformed(frozen(), h)
    assert frozen().transformed_bytes() == 4 * 16 * winograd.LEAST_CHANNELS**2
    assert not is_transformed(frozen().requires_grad_(True), h)
    assert frozen(32).transformed_bytes() == 0
    sparing = frozen()
    sparing.spare_memory = True
    assert not is_transformed(sparing, h)
    assert frozen()(h[..., :7]).shape == (1, winograd.LEAST_CHANNELS, 8, 7)
    assert frozen().bfloat16()(h.bfloat16()).dtype == torch.bfloat16


def test_changed_weights_are_transformed_anew() -> None:
    torch.manual_seed(0)
    convolution, h = frozen(), torch.randn(1, winograd.LEAST_CHANNELS, 4, 4)
    convolution(h)
    convolution.weight.mul_(2)
    assert is_transformed(convolution, h)
    convolution.load_state_dict(frozen().state_dict())
    assert is_transformed(convolution, h)
    assert set(convolution.state_dict()) == {"weight", "bias"}
