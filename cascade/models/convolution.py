"""A convolution that takes the way with the fewest multiplications while its weights are frozen and on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models import phases, winograd

LEAST_CHANNELS = {torch.float32: 192, torch.bfloat16: 256}
"""With fewer in or out, the transforms cost what they save. In bfloat16 they also round more often, which the finest,
narrowest level would show."""

_current = threading.local()


@contextmanager
def one_generation(generation: object) -> Iterator[None]:
    """Inside, in this thread, convolutions may keep transformed kernels for later calls of the same generation.

    generation: the same object in all network calls between which no weight changes. Whether a weight has changed
    cannot be seen for sure: writing through `.data`, as peft's merging does, moves neither address nor version, new
    weights may lie where old ones did, and those made in inference mode have no version.
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
    """A convolution. Within `one_generation`, one of 3x3, padded by 1, frozen, on a CPU holds its transformed kernel.

    Made with the arguments of its parent, since low-rank adaptation makes two smaller ones of the same class.
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
        return winograd.convolve(h, self._transformed(winograd.transform_kernel), self.bias)

    def enlarging(self, h: Tensor) -> Tensor:
        """What `forward` gives for h, one that it `transforms`, enlarged: (B, C_in, H, W) -> (B, C, 2 H, 2 W)."""
        assert self.bias is not None
        return phases.convolve(h, self._transformed(phases.transform_kernel), self.bias)

    def transforms(self, h: Tensor) -> bool:
        """Whether this input meets a transformed kernel."""
        if torch.compiler.is_compiling() or _generation() is None or not h.numel():
            return False
        frozen = not any(tensor.requires_grad for tensor in (h, *self.parameters()))
        plain = h.device.type == "cpu" and h.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")
        return frozen and plain and self.transformed_bytes(h.dtype) > 0

    def transformed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the transformed kernel that drawing in `dtype` on a CPU holds beside the weight."""
        if self.spare_memory or not self._fits() or dtype not in LEAST_CHANNELS:
            return 0
        wide = min(self.in_channels, self.out_channels) >= LEAST_CHANNELS[dtype]
        return 16 * self.in_channels * self.out_channels * dtype.itemsize if wide else 0

    def _fits(self) -> bool:
        """Whether it is one of those that can be transformed. Asked each time: whoever wants pictures that repeat
        without a seam changes `padding_mode` of networks that there are, or replaces `_conv_forward`."""
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        usual = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and "_conv_forward" not in self.__dict__
        return usual and self.bias is not None

    def _transformed(self, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Anew for each generation, and within one where a change of the weight can be seen."""
        weight, held = self.weight, self._kernel  # another thread may hold another generation's
        version = None if weight.is_inference() else weight._version
        state = (_generation(), transform, weight.data_ptr(), weight.dtype, version)
        if held is None or held[0] != state:
            held = self._kernel = (state, transform(weight))
        return held[1]
