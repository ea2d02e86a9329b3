"""A convolution that uses an algorithm with fewer multiplications while its weights are frozen and on a CPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- winograd --------------------------------------------------------------------------------------------------------
# 3x3 convolutions with 16 multiplications per four pixels instead of 36, for frozen networks on a CPU.
#
# Each 4x4 patch of the picture yields 2x2 pixels. The patch and the kernel are transformed by sums and differences
# and multiplied elementwise (a matrix product over channels at each of 16 positions); the products are transformed
# back.
#
# Source: Lavin & Gray (2016), F(2x2, 3x3).

BAND_BYTES = 16_000_000
"""Upper bound on a band's transformed rows. A smaller band stays in the cache, but packs the kernel more often."""

AT_ONCE = 64
"""Channels whose kernels are transformed together, which limits the temporary float32 copies of bfloat16 weights."""


def winograd_kernel(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (16, C_in, C): G weight G^T, one matrix for each of 16 positions."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=exact)
    kernel = weight.new_empty(16, weight.shape[1], weight.shape[0])
    for part, place in zip(weight.split(AT_ONCE), kernel.split(AT_ONCE, dim=2), strict=True):
        place.copy_(torch.einsum("ai,ocij,bj->abco", g, part.to(exact), g).flatten(0, 1))
    return kernel


def winograd_convolve(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
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


# --- phases ----------------------------------------------------------------------------------------------------------
# A 3x3 convolution after nearest-neighbour enlargement, as four 2x2 ones of the small picture: 16 taps, not 36.
#
# Enlargement turns each pixel into 2x2 equal ones, so several taps of a kernel read the same small pixel and their
# sum is one tap. Which taps coincide depends on the phase: whether the kernel's centre is in an even or an odd row
# and column. The result is equal up to rounding.

MEETING = ([[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]])
"""The taps, of three, that read the first and the second small pixel, in even and in odd rows or columns."""


def phase_kernels(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (2, 2, C, 2, 2, C_in): a channels-last kernel for even and odd rows, even and odd columns."""
    meeting = torch.tensor(MEETING, dtype=torch.promote_types(weight.dtype, torch.float32))
    channels, channels_in = weight.shape[:2]
    kernel = weight.new_empty(2, 2, channels, 2, 2, channels_in)
    for part, place in zip(weight.split(AT_ONCE), kernel.split(AT_ONCE, dim=2), strict=True):
        place.copy_(torch.einsum("rai,ocij,sbj->rsoabc", meeting, part.to(meeting.dtype), meeting))
    return kernel


def phase_convolve(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """h: (B, C_in, H, W); kernel: from `phase_kernels` -> (B, C, 2 H, 2 W), channels last."""
    batch, _, height, width = h.shape
    result = h.new_empty(batch, height, 2, width, 2, kernel.shape[2])
    for row in range(2):
        for column in range(2):
            padded = F.pad(h, (1 - column, column, 1 - row, row))
            pixels = F.conv2d(padded, kernel[row, column].permute(0, 3, 1, 2), bias)
            result[:, :, row, :, column] = pixels.permute(0, 2, 3, 1)
    return result.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


# --- convolution -----------------------------------------------------------------------------------------------------

LEAST_CHANNELS = {torch.float32: 192, torch.bfloat16: 256}
"""With fewer input or output channels the transforms cost as much as they save. In bfloat16 they also round more often,
which is visible at the finest, narrowest level."""

_current = threading.local()


@contextmanager
def one_generation(generation: object) -> Iterator[None]:
    """Context in which this thread's convolutions may keep transformed kernels for later calls of one generation.

    generation: the same object in all network calls between which no weight changes. A changed weight cannot be
    detected reliably: writing through `.data`, as peft's merging does, changes neither address nor version, new weights
    may have the address of old ones, and tensors made in inference mode have no version.
    """
    before = _generation()
    _current.generation = generation
    try:
        yield
    finally:
        _current.generation = before


def _generation() -> object | None:
    return getattr(_current, "generation", None)


class Convolution(nn.Conv2d):
    """A convolution. Within `one_generation`, a frozen 3x3 one with padding 1 on a CPU holds its transformed kernel.

    Takes the arguments of its parent class, since low-rank adaptation creates two smaller layers of the same class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spare_memory = False
        self._kernel: tuple[object, Tensor] | None = None

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        if not self.transforms(h) or h.shape[-1] % 2 or h.shape[-2] % 2:
            return super().forward(h)
        assert self.bias is not None
        return winograd_convolve(h, self._transformed(winograd_kernel), self.bias)

    def enlarging(self, h: Tensor) -> Tensor:
        """`forward` of h enlarged by nearest neighbours, if it `transforms` h: (B, C_in, H, W) -> (B, C, 2 H, 2 W)."""
        assert self.bias is not None
        return phase_convolve(h, self._transformed(phase_kernels), self.bias)

    def transforms(self, h: Tensor) -> bool:
        """Whether a transformed kernel is used for this input."""
        if torch.compiler.is_compiling() or _generation() is None or not h.numel():
            return False
        frozen = not any(tensor.requires_grad for tensor in (h, *self.parameters()))
        plain = h.device.type == "cpu" and h.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        return frozen and plain and self.transformed_bytes(h.dtype) > 0

    def transformed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the transformed kernel that drawing in `dtype` on a CPU holds in addition to the weight."""
        if self.spare_memory or not self._fits() or dtype not in LEAST_CHANNELS:
            return 0
        wide = min(self.in_channels, self.out_channels) >= LEAST_CHANNELS[dtype]
        return 16 * self.in_channels * self.out_channels * dtype.itemsize if wide else 0

    def _fits(self) -> bool:
        """Whether this layer can be transformed. Checked on every call: users who draw seamless textures change
        `padding_mode` of an existing network, or replace `_conv_forward`."""
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        usual = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and "_conv_forward" not in self.__dict__
        return usual and self.bias is not None

    def _transformed(self, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """The transformed kernel, computed again for each generation and after any detected change of the weight."""
        weight, held = self.weight, self._kernel  # another thread may hold another generation's
        version = None if weight.is_inference() else weight._version
        state = (_generation(), transform, weight.data_ptr(), weight.dtype, version)
        if held is None or held[0] != state:
            held = self._kernel = (state, transform(weight))
        return held[1]
