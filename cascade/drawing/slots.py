"""The parts of a pipeline, in memory or loaded on demand, and the messages when memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from cascade.config.stage import StageConfig
from cascade.errors import CascadeError, ShortageError
from cascade.resources.memory import StageCost
from cascade.stage import Stage
from cascade.system.device import free_bytes, is_out_of_memory
from cascade.text.t5 import TextEncoder


@dataclass(frozen=True)
class StageSlot:
    """A stage of a pipeline: in memory, or (`--low-memory`) loaded for its turn and released after it.

    adapters: scales of the low-rank adapters that were added to its weights, by the digest of each.
    """

    config: StageConfig
    load: Callable[[], Stage]
    held: bool = False
    adapters: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def holding(cls, stage: Stage) -> StageSlot:
        """A slot whose stage stays in memory."""
        return cls(stage.config, lambda: stage, held=True)

    def moved(self, device: torch.device, dtype: torch.dtype) -> StageSlot:
        """The same slot with its stage on a device and in a number format: immediately, or each time it is loaded."""
        if self.held:
            self.load().to(device, dtype)
            return self
        return replace(self, load=lambda: self.load().to(device, dtype))


def adapters_in(slots: Iterable[StageSlot]) -> dict[str, dict[str, float]]:
    """The recipe's entry on adapters: by stage, those that have any."""
    return {slot.config.name: dict(slot.adapters) for slot in slots if slot.adapters}


class TextSlot:
    """The text encoder of a pipeline: in memory, or (`--low-memory`) released after reading, and loaded again."""

    def __init__(self, encoder: TextEncoder, reload: Callable[[], TextEncoder] | None) -> None:
        """reload: a function that loads the encoder again; None: it is never released."""
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
        """A context with the encoder and its weights, which may be released at its end."""
        yield self.load()
        if self._reload is not None:
            self.encoder.release()
            self._released = True


@contextmanager
def running(slot: StageSlot) -> Iterator[Stage]:
    """A context with the slot's stage; a memory shortage inside becomes a ShortageError with the stage's name."""
    with shortage_names(slot.config.name):
        yield slot.load()


@contextmanager
def shortage_names(stage: str) -> Iterator[None]:
    """A context in which a memory shortage becomes a ShortageError with the stage's name."""
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
    """Raises MemoryError for pictures that certainly do not fit, before their noise is drawn."""
    needed = batch_size * StageCost(stage).least_bytes(size, dtype, tile)
    free = free_bytes(device)
    if needed > free:
        raise MemoryError(f": needs more than {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")


def not_finite(stage: str) -> str:
    """The message for NaN or infinity in a picture."""
    return f"stage {stage}: the network's output is not finite; try dtype float32, or check its weights"


def _out_of_memory(stage: str, numbers: str = "") -> CascadeError:
    return ShortageError(
        f"out of memory in stage {stage}{numbers}; use a smaller batch_size, low_memory, dtype bfloat16,"
        " a smaller height and width, stop earlier with until, or (upscale) a tile"
    )
