"""Transparency of a picture to enlarge: its colours and its alpha channel are enlarged separately, then joined."""

from __future__ import annotations

from functools import reduce
from itertools import product
from operator import add
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

_Array: TypeAlias = np.ndarray[Any, Any]
_NEAR = 4
"""Distance in pixels over which transparent pixels take the colours of their neighbours; bicubic needs two."""


def is_opaque(image: Image.Image) -> bool:
    """Whether an RGB or RGBA picture has no transparent pixel."""
    return image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255


def bled(image: Image.Image) -> Image.Image:
    """RGB of RGBA, in which transparent pixels (alpha 0) continue the colours of those around them.

    The colour of a transparent pixel is arbitrary, often white or black, and would mix into the edges as a fringe. All
    other pixels keep their colours; a fully transparent picture becomes white.
    """
    pixels = np.asarray(image, dtype=np.float32)
    colours, weights = pixels[..., :3], pixels[..., 3:] / 255
    if not weights.any():
        return Image.new("RGB", image.size, "white")
    for _ in range(_NEAR):
        colours, weights = _grown(colours, weights)
    return Image.fromarray(_filled(colours, weights).round().astype(np.uint8))


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """RGBA from an enlarged RGB picture and the alpha channel of the smaller one, which is enlarged as a picture."""
    whole = image.copy()
    whole.putalpha(alpha.resize(image.size, Image.Resampling.BICUBIC))
    return whole


def _grown(colours: _Array, weights: _Array) -> tuple[_Array, _Array]:
    """Give each transparent pixel with visible neighbours their mean colour, weighted by alpha, and mean alpha."""
    height, width = weights.shape[:2]
    sums = np.pad(np.concatenate((colours * weights, weights, weights > 0), axis=2), ((1, 1), (1, 1), (0, 0)))
    around = reduce(add, (sums[top : top + height, left : left + width] for top, left in product(range(3), repeat=2)))
    total, count = around[..., 3:4], around[..., 4:]
    new = (weights == 0) & (total > 0)
    mean = around[..., :3] / np.where(new, total, 1)
    return np.where(new, mean, colours), np.where(new, total / np.maximum(count, 1), weights)


def _filled(colours: _Array, weights: _Array) -> _Array:
    """Give transparent pixels the mean colour of the smallest square around them that contains a visible one.

    The squares are those of a pyramid, 2, 4, 8, ... pixels wide. Source: pull-push of Gortler et al. (1996), in which
    distant pixels count only where no nearer ones are known.
    """
    if (weights > 0).all():
        return colours
    total = _halved(weights)
    mean = _halved(colours * weights) / np.where(total > 0, total, 1)
    behind = _filled(mean, total).repeat(2, axis=0).repeat(2, axis=1)
    height, width = weights.shape[:2]
    return np.where(weights > 0, colours, behind[:height, :width])


def _halved(values: _Array) -> _Array:
    """(H, W, C) -> sums over squares of two by two."""
    height, width = values.shape[:2]
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, -1).sum(axis=(1, 3))
