"""F(2x2, 3x3): the same sums with fewer multiplications."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models import convolution
from cascade.models.convolution import winograd_convolve, winograd_kernel


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (10, 4)])
@pytest.mark.parametrize("band", [1, 20_000, 10**9], ids=["two rows", "some", "whole"])
def test_it_is_the_convolution(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], band: int) -> None:
    monkeypatch.setattr(convolution, "BAND_BYTES", band)
    h, weight, bias = numbers(2, 3, *size), numbers(5, 3, 3, 3, seed=1), numbers(5, seed=2)
    ours = winograd_convolve(h, winograd_kernel(weight), bias)
    torch.testing.assert_close(ours, F.conv2d(h, weight, bias, padding=1), rtol=0, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_what_is_kept_between_calls_reaches_no_result() -> None:
    """Within inference and outside of it, in another number format, and in another thread."""
    weight, bias = numbers(5, 3, 3, 3, seed=1), numbers(5, seed=2)
    kernel, pictures = winograd_kernel(weight), [numbers(2, 3, 8, 8, seed=seed) for seed in range(3)]
    expected = [F.conv2d(h, weight, bias, padding=1) for h in pictures]
    found: list[Tensor] = []
    with torch.inference_mode():
        found.append(winograd_convolve(pictures[0], kernel, bias))
        winograd_convolve(pictures[0].float(), kernel.float(), bias.float())
    thread = threading.Thread(target=lambda: found.append(winograd_convolve(pictures[1], kernel, bias)))
    thread.start()
    thread.join()
    found.append(winograd_convolve(pictures[2], kernel, bias))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
