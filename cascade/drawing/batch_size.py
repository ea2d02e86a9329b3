"""How many pictures pass through a network at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from cascade.cost import StageCost
from cascade.drawing.task import Pass
from cascade.machine import free_bytes, is_out_of_memory

Wish: TypeAlias = int | Mapping[str, int] | str | None
"""For all stages, or {stage: size}; "auto": what should fit, halved when memory runs out; None: 1 on a CPU, else 8."""

_DEFAULT_ON_CPU, _DEFAULT = 1, 8
_LARGEST_ON_CPU, _LARGEST = 4, 64  # on a CPU larger ones bring little, and the kernel kills what takes too much


class BatchSizes:
    """The batch size of each stage at each size of picture; with "auto" it falls until it fits."""

    def __init__(self, wish: Wish, device: torch.device) -> None:
        self._wish, self._device = wish, device
        self._on_cpu = device.type == "cpu"
        self._sizes: dict[tuple[str, tuple[int, int]], int] = {}

    def of(self, drawing: Pass) -> int:
        """Of a stage at a size; every call of its network has this many pictures."""
        key = (drawing.slot.config.name, drawing.size)
        if key not in self._sizes:
            self._sizes[key] = self._first(drawing)
        return self._sizes[key]

    @property
    def largest(self) -> int | None:
        """What no batch exceeds, whatever memory is free; None: that depends on the stage."""
        return self._largest if self._wish == "auto" else None

    def halve(self, drawing: Pass, error: BaseException) -> bool:
        """Whether a smaller batch is worth a try after an error; then the stage has one."""
        size = self.of(drawing)
        if self._wish != "auto" or size == 1 or not is_out_of_memory(error):
            return False
        self._sizes[drawing.slot.config.name, drawing.size] = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    @property
    def _largest(self) -> int:
        return _LARGEST_ON_CPU if self._on_cpu else _LARGEST

    def _first(self, drawing: Pass) -> int:
        if isinstance(self._wish, int):
            return self._wish
        if isinstance(self._wish, Mapping):
            return self._wish[drawing.slot.config.name]
        if self._wish is None:
            return default_batch_size(self._device)
        if not self._on_cpu:
            return self._largest
        likely = StageCost(drawing.slot.config).likely_bytes(drawing.size)
        return max(1, min(self._largest, int(free_bytes(self._device) // (2 * likely))))


def default_batch_size(device: torch.device) -> int:
    """Pictures per network call unless the caller says otherwise."""
    return _DEFAULT_ON_CPU if device.type == "cpu" else _DEFAULT
