"""The parts of a pipeline: held, or loaded when their turn comes; and what is said when memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from cascade.config.stage import StageConfig
from cascade.cost import StageCost
from cascade.errors import CascadeError, ShortageError
from cascade.machine import free_bytes, is_out_of_memory
from cascade.stage import Stage
from cascade.text.t5 import TextEncoder


@dataclass(frozen=True)
class StageSlot:
    """A stage of a pipeline: in memory, or (`--low-memory`) loaded when its turn comes and dropped after it."""

    config: StageConfig
    load: Callable[[], Stage]
    held: bool = False

    @classmethod
    def holding(cls, stage: Stage) -> StageSlot:
        """A slot whose stage stays in memory."""
        return cls(stage.config, lambda: stage, held=True)

    def moved(self, device: torch.device, dtype: torch.dtype) -> StageSlot:
        """The same slot, its stage on a device and in a number format: at once, or whenever it is loaded."""
        if self.held:
            self.load().to(device, dtype)
            return self
        return replace(self, load=lambda: self.load().to(device, dtype))


class TextSlot:
    """The text encoder of a pipeline: in memory, or (`--low-memory`) released after it has read, and loaded again."""

    def __init__(self, encoder: TextEncoder, reload: Callable[[], TextEncoder] | None) -> None:
        """reload: loads the encoder again; None: it is never released."""
        self.encoder = encoder
        self._reload = reload
        self._released = False

    def load(self) -> TextEncoder:
        """The encoder with its weights."""
        if self._released and self._reload is not None:
            self.encoder = self._reload()
            self._released = False
        return self.encoder

    @contextmanager
    def reading(self) -> Iterator[TextEncoder]:
        """The encoder with its weights, which are not needed afterwards."""
        yield self.load()
        if self._reload is not None:
            self.encoder.release()
            self._released = True


@contextmanager
def running(slot: StageSlot) -> Iterator[Stage]:
    """The slot's stage; running out of memory inside is told with the stage's name."""
    with memory_told(slot.config.name):
        yield slot.load()


@contextmanager
def memory_told(stage: str) -> Iterator[None]:
    """Running out of memory inside becomes a CascadeError with the stage's name."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            numbers = str(error) if isinstance(error, MemoryError) else ""
            raise _out_of_memory(stage, numbers) from error
        raise


def check_memory(
    stage: StageConfig,
    size: tuple[int, int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    tile: int | None = None,
) -> None:
    """Raises MemoryError for pictures that certainly do not fit, before any noise for them is drawn."""
    needed = batch_size * StageCost(stage).least_bytes(size, dtype, tile)
    free = free_bytes(device)
    if needed > free:
        raise MemoryError(f": needs more than {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")


def not_finite(stage: str) -> str:
    """What is said of NaN in a picture."""
    return f"stage {stage}: the network gave numbers that are not finite; try dtype float32, or check its weights"


def _out_of_memory(stage: str, numbers: str = "") -> CascadeError:
    return ShortageError(
        f"out of memory in stage {stage}{numbers}; use a smaller batch_size, low_memory, dtype bfloat16,"
        " a smaller height and width, stop earlier with until, or (upscale) a tile"
    )
