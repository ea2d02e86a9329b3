"""A convolution that takes the way with the fewest multiplications while its weights are frozen and on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models import phases, winograd

LEAST_CHANNELS = {torch.float32: 192, torch.bfloat16: 256}
"""With fewer in or out, the transforms cost what they save. In bfloat16 they also round more often, which the finest,
narrowest level would show."""


class Convolution(nn.Conv2d):
    """A convolution. One of 3x3, padded by 1, frozen, and on a CPU holds its transformed kernel beside it.

    Made with the arguments of its parent, since low-rank adaptation makes two smaller ones of the same class.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.spare_memory = False
        self._kernel: tuple[object, Tensor] | None = None
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        self._fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and self.bias is not None

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        if not self.transforms(h) or h.shape[-1] % 2 or h.shape[-2] % 2:
            return super().forward(h)
        assert self.bias is not None
        return winograd.convolve(h, self._transformed(winograd.transform_kernel), self.bias)

    def enlarging(self, h: Tensor) -> Tensor:
        """What `forward` gives for h, one that it `transforms`, enlarged: (B, C_in, H, W) -> (B, C, 2 H, 2 W)."""
        assert self.bias is not None
        return phases.convolve(h, self._transformed(phases.transform_kernel), self.bias)

    def transforms(self, h: Tensor) -> bool:
        """Whether this input meets a transformed kernel."""
        frozen = not any(tensor.requires_grad for tensor in (h, *self.parameters()))
        plain = h.device.type == "cpu" and h.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        return frozen and plain and not torch.compiler.is_compiling() and self.transformed_bytes(h.dtype) > 0

    def transformed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the transformed kernel that drawing in `dtype` on a CPU holds beside the weight."""
        if self.spare_memory or not self._fits or dtype not in LEAST_CHANNELS:
            return 0
        wide = min(self.in_channels, self.out_channels) >= LEAST_CHANNELS[dtype]
        return 16 * self.in_channels * self.out_channels * dtype.itemsize if wide else 0

    def _transformed(self, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Anew whenever the weight is another tensor, or was written to."""
        weight = self.weight
        state = (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version, transform)
        if self._kernel is None or self._kernel[0] != state:
            self._kernel = (state, transform(weight))
        return self._kernel[1]
