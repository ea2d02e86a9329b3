"""3x3 convolutions with 16 multiplications for every four pixels in place of 36, for frozen networks on a CPU.

Each 4x4 patch of the picture gives 2x2 pixels: both the patch and the kernel are transformed by sums and differences,
multiplied place by place (a matrix product over channels for each of 16 places), and the products are transformed back.

Source: Lavin & Gray (2016), F(2x2, 3x3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_CHANNELS = 256
"""With fewer, the transforms cost more than the multiplications they save (measured: 192 channels lose, 384 win)."""

BAND_NUMBERS = 8_000_000
"""Numbers of a band's transformed rows at most, so that they stay in the processor's cache."""


class Convolution(nn.Conv2d):
    """A convolution. One of 3x3, padded by 1, frozen, in float32 and on a CPU holds its transformed kernel beside it.

    bfloat16 stays with the plain one: rounding the transformed numbers would triple its error. Made with the arguments
    of its parent, since low-rank adaptation makes two smaller ones of the same class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spare_memory = False
        self._kernel: tuple[object, Tensor] | None = None
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        self._fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and self.bias is not None

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        if not self._pays(h):
            return super().forward(h)
        assert self.bias is not None
        return convolve(h, self._transformed(), self.bias)

    def transformed_bytes(self) -> int:
        """Bytes of the transformed kernel that drawing on a CPU in float32 holds beside the weight."""
        held = self._fits and not self.spare_memory and min(self.in_channels, self.out_channels) >= LEAST_CHANNELS
        return 4 * 16 * self.in_channels * self.out_channels if held else 0

    def _pays(self, h: Tensor) -> bool:
        frozen = not (self.weight.requires_grad or h.requires_grad)
        plain = h.device.type == "cpu" and h.dtype == self.weight.dtype == torch.float32
        even = h.shape[-1] % 2 == h.shape[-2] % 2 == 0
        return frozen and plain and even and self.transformed_bytes() > 0 and not torch.is_autocast_enabled("cpu")

    def _transformed(self) -> Tensor:
        """Anew whenever the weight is another tensor, or was written to."""
        weight = self.weight
        state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
        if self._kernel is None or self._kernel[0] != state:
            self._kernel = (state, transform_kernel(weight))
        return self._kernel[1]


def transform_kernel(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (16, C_in, C): G weight G^T, place by place."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=weight.dtype)
    return torch.einsum("ai,ocij,bj->abco", g, weight, g).flatten(0, 1).contiguous()


def convolve(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """h: (B, C_in, H, W), H and W even; kernel: (16, C_in, C) -> (B, C, H, W), channels last."""
    batch, channels_in, height, width = h.shape
    channels = kernel.shape[2]
    padded = F.pad(h, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C_in)
    result = h.new_empty(batch, height, width, channels)
    row = 16 * batch * (width // 2) * (channels_in + channels)  # numbers for two rows of pixels
    band = 2 * max(1, BAND_NUMBERS // row)
    for top in range(0, height, band):
        patches = _transform_patches(padded[:, top : top + band + 2])
        products = torch.bmm(patches.flatten(0, 1).flatten(1, 3), kernel)
        _transform_back(
            products.unflatten(1, patches.shape[2:5]).unflatten(0, (4, 4)), bias, result[:, top : top + band]
        )
    return result.permute(0, 3, 1, 2)


def _transform_patches(rows: Tensor) -> Tensor:
    """(B, 2 K + 2, 2 T + 2, C) -> (4, 4, B, K, T, C): B^T patch B of each 4x4 patch, which overlap by two."""
    batch, height, width, channels = rows.shape
    tall, wide = height // 2 - 1, width // 2 - 1
    a, b, c, d = (rows[:, start : start + 2 * tall - 1 : 2] for start in range(4))
    patches = rows.new_empty(4, 4, batch, tall, wide, channels)
    for place, line in enumerate((a - c, b + c, c - b, b - d)):
        a, b, c, d = (line[:, :, start : start + 2 * wide - 1 : 2] for start in range(4))
        torch.sub(a, c, out=patches[place, 0])
        torch.add(b, c, out=patches[place, 1])
        torch.sub(c, b, out=patches[place, 2])
        torch.sub(b, d, out=patches[place, 3])
    return patches


def _transform_back(products: Tensor, bias: Tensor, result: Tensor) -> None:
    """(4, 4, B, K, T, C) -> `result` (B, 2 K, 2 T, C): A^T products A of each patch."""
    even = products[0] + products[1] + products[2]
    odd = products[1] - products[2] - products[3]
    for row, (a, b, c, d) in enumerate((even, odd)):
        lines = result[:, row::2]
        b = b + bias
        lines[:, :, 0::2] = (a + b).add_(c)
        lines[:, :, 1::2] = b.sub_(c).sub_(d)
