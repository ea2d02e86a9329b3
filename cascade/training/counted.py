"""Normal noise without a generator: a number is a function of a key and its place, so that a GPU makes all at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Constants of SplitMix64, as signed numbers; sums and products wrap."""
_HALF = 2**32


def counted_noise(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (B, *shape) in float32, row b a function of keys[b] alone.

    keys: (B,) int64, as if random, on the device that shall have the noise. One generator a picture would take a
    launch a picture; here it is some twenty, whatever B is. Every GPU gives the same, but for the last bits of its
    logarithm and cosine. Source: SplitMix64 (Steele et al. 2014), of which Box & Muller (1958) make two numbers each.
    """
    count = math.prod(shape)
    places = torch.arange(1, -(-count // 2) + 1, device=keys.device)
    state = _mixed(keys[:, None] + _GOLDEN * places)
    radius = (-2 * (((state >> 32 & _HALF - 1) + 0.5) / _HALF).log()).sqrt()  # at most 6.8
    angle = (state & _HALF - 1) * (2 * math.pi / _HALF)
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, :count].unflatten(1, shape)


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's last three lines; int64 >> keeps the sign, which the masks take away."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)
