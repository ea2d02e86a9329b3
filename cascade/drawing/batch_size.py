"""The number of pictures per network call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from cascade.cost import StageCost
from cascade.drawing.task import Pass
from cascade.machine import free_bytes, is_out_of_memory

BatchSize: TypeAlias = int | Mapping[str, int] | str | None
"""One size for all stages, or {stage: size}; "auto": a size that should fit, halved when memory runs out; None: 1 on a
CPU, 8 on a GPU."""

_DEFAULT_ON_CPU, _DEFAULT = 1, 8
_LARGEST_ON_CPU, _LARGEST = 4, 64  # on a CPU larger batches gain little, and the kernel kills a process without memory


class BatchSizes:
    """The batch size of each stage at each picture size; with "auto" it decreases until it fits."""

    def __init__(self, size: BatchSize, device: torch.device) -> None:
        self._asked, self._device = size, device
        self._on_cpu = device.type == "cpu"
        self._sizes: dict[tuple[str, tuple[int, int]], int] = {}

    def of(self, drawing: Pass) -> int:
        """The batch size of a stage at a picture size; every call of its network has this many pictures."""
        key = (drawing.slot.config.name, drawing.size)
        if key not in self._sizes:
            self._sizes[key] = self._first(drawing)
        return self._sizes[key]

    @property
    def largest(self) -> int | None:
        """Upper bound on all batch sizes, whatever memory is free; None: it depends on the stage."""
        return self._largest if self._asked == "auto" else None

    def halve(self, drawing: Pass, error: BaseException) -> bool:
        """Halve the stage's batch size after an error, and return whether a new attempt is worthwhile."""
        size = self.of(drawing)
        if self._asked != "auto" or size == 1 or not is_out_of_memory(error):
            return False
        self._sizes[drawing.slot.config.name, drawing.size] = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    @property
    def _largest(self) -> int:
        return _LARGEST_ON_CPU if self._on_cpu else _LARGEST

    def _first(self, drawing: Pass) -> int:
        if isinstance(self._asked, int):
            return self._asked
        if isinstance(self._asked, Mapping):
            return self._asked[drawing.slot.config.name]
        if self._asked is None:
            return default_batch_size(self._device)
        if not self._on_cpu:
            return self._largest
        likely = StageCost(drawing.slot.config).likely_bytes(drawing.size)
        return max(1, min(self._largest, int(free_bytes(self._device) // (2 * likely))))


def default_batch_size(device: torch.device) -> int:
    """Pictures per network call if the caller gives no batch size."""
    return _DEFAULT_ON_CPU if device.type == "cpu" else _DEFAULT
