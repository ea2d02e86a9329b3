"""A convolution that uses an algorithm with fewer multiplications while its weights are frozen and on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models import phases, winograd

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
        return winograd.convolve(h, self._transformed(winograd.transform_kernel), self.bias)

    def enlarging(self, h: Tensor) -> Tensor:
        """`forward` of h enlarged by nearest neighbours, if it `transforms` h: (B, C_in, H, W) -> (B, C, 2 H, 2 W)."""
        assert self.bias is not None
        return phases.convolve(h, self._transformed(phases.transform_kernel), self.bias)

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
