"""3x3 convolutions with 16 multiplications per four pixels instead of 36, for frozen networks on a CPU.

Each 4x4 patch of the picture yields 2x2 pixels. The patch and the kernel are transformed by sums and differences and
multiplied elementwise (a matrix product over channels at each of 16 positions); the products are transformed back.

Source: Lavin & Gray (2016), F(2x2, 3x3).
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

BAND_BYTES = 16_000_000
"""Upper bound on a band's transformed rows. A smaller band stays in the cache, but packs the kernel more often."""

AT_ONCE = 64
"""Channels whose kernels are transformed together, which limits the temporary float32 copies of bfloat16 weights."""


def transform_kernel(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (16, C_in, C): G weight G^T, one matrix for each of 16 positions."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=exact)
    kernel = weight.new_empty(16, weight.shape[1], weight.shape[0])
    for part, place in zip(weight.split(AT_ONCE), kernel.split(AT_ONCE, dim=2), strict=True):
        place.copy_(torch.einsum("ai,ocij,bj->abco", g, part.to(exact), g).flatten(0, 1))
    return kernel


def convolve(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """h: (B, C_in, H, W), H and W even; kernel: (16, C_in, C) -> (B, C, H, W), channels last."""
    batch, channels_in, height, width = h.shape
    channels = kernel.shape[2]
    pixels = _split(h)
    result = h.new_empty(batch, height, width, channels)
    tall, wide = height // 2, width // 2
    row = max(1, 16 * batch * wide * (channels_in + channels) * h.element_size())  # 0 for an empty batch
    bands = max(1, math.ceil(tall / max(1, BAND_BYTES // row)))
    band = max(1, math.ceil(tall / bands))  # of nearly equal height
    for top in range(0, tall, band):
        count = min(band, tall - top)
        patches = _workspace("patches", h, (4, 4, batch, count, wide, channels_in))
        products = _workspace("products", h, (4, 4, batch, count, wide, channels))
        _transform_patches(pixels[:, :, :, top : top + count + 1], patches)
        torch.bmm(patches.flatten(2, 4).flatten(0, 1), kernel, out=products.view(16, -1, channels))
        products[1, 1] += bias  # this position enters each of the four pixels once, with a plus sign
        _transform_back(products, result[:, 2 * top : 2 * (top + count)])
    return result.permute(0, 3, 1, 2)


def _split(h: Tensor) -> Tensor:
    """(B, C, H, W) -> (2, 2, B, H / 2 + 1, W / 2 + 1, C): padded by 1, split into even and odd rows and columns.

    Each step of the transformation then runs over whole rows that are contiguous in memory.
    """
    batch, channels, height, width = h.shape
    pixels = h.new_zeros(2, 2, batch, height // 2 + 1, width // 2 + 1, channels)
    h = h.permute(0, 2, 3, 1)
    pixels[1, 1, :, :-1, :-1] = h[:, 0::2, 0::2]  # row 0 is row 1 of the padded picture
    pixels[1, 0, :, :-1, 1:] = h[:, 0::2, 1::2]
    pixels[0, 1, :, 1:, :-1] = h[:, 1::2, 0::2]
    pixels[0, 0, :, 1:, 1:] = h[:, 1::2, 1::2]
    return pixels


def _transform_patches(pixels: Tensor, patches: Tensor) -> None:
    """(2, 2, B, K + 1, T + 1, C) -> `patches` (4, 4, B, K, T, C): B^T patch B of the 4x4 patches; they overlap by 2."""
    even, odd = pixels
    a, b, c, d = even[:, :, :-1], odd[:, :, :-1], even[:, :, 1:], odd[:, :, 1:]
    for place, (even, odd) in enumerate((a - c, b + c, c - b, b - d)):
        first, second, third, fourth = even[:, :, :-1], odd[:, :, :-1], even[:, :, 1:], odd[:, :, 1:]
        torch.sub(first, third, out=patches[place, 0])
        torch.add(second, third, out=patches[place, 1])
        torch.sub(third, second, out=patches[place, 2])
        torch.sub(second, fourth, out=patches[place, 3])


def _transform_back(products: Tensor, result: Tensor) -> None:
    """(4, 4, B, K, T, C) -> `result` (B, 2 K, 2 T, C): A^T products A of each patch.

    One matrix product rounds its sums once; in bfloat16 two steps would round twice.
    """
    a = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=products.dtype)
    pixels = torch.mm(torch.kron(a, a), products.flatten(0, 1).flatten(1)).view(2, 2, *products.shape[2:])
    for row in range(2):
        for column in range(2):
            result[:, row::2, column::2] = pixels[row, column]


_kept = threading.local()


def _workspace(name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialized tensor that this thread reuses: allocating fresh memory takes longer than filling it."""
    size = torch.Size(shape).numel()
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or kept.dtype != like.dtype or kept.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written in training
            kept = torch.empty(size, dtype=like.dtype)
        setattr(_kept, name, kept)
    return kept[:size].view(shape)
