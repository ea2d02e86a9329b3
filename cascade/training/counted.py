"""Counter-based normal noise: each value is a function of a key and its index, so a GPU computes all in parallel."""

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

    keys: (B,) int64, pseudo-random, on the device of the result. One generator per picture would need one kernel launch
    per picture; this takes about twenty for any B. Results on different GPUs agree up to the last bits of logarithm and
    cosine. Source: SplitMix64 (Steele et al. 2014), each of whose outputs gives two values by Box & Muller (1958).
    """
    count = math.prod(shape)
    places = torch.arange(1, -(-count // 2) + 1, device=keys.device)
    state = _mixed(keys[:, None] + _GOLDEN * places)
    radius = (-2 * (((state >> 32 & _HALF - 1) + 0.5) / _HALF).log()).sqrt()  # at most 6.8
    angle = (state & _HALF - 1) * (2 * math.pi / _HALF)
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, :count].unflatten(1, shape)


def _mixed(state: Tensor) -> Tensor:
    """The last three lines of SplitMix64; int64 >> extends the sign, which the masks remove."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)
