"""A convolution after an enlargement, computed on the small picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cascade.models.convolution import phase_convolve, phase_kernels


@pytest.mark.parametrize("size", [(1, 1), (4, 3), (5, 2)])
def test_it_is_the_convolution_of_the_enlarged_picture(size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((2, 3, *size), (5, 3, 3, 3), (5,))
    )
    expected = F.conv2d(F.interpolate(h, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    ours = phase_convolve(h, phase_kernels(weight), bias)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)
