"""Checks in every step that stop a run with a one-line error before it saves a bad checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from cascade.errors import CascadeError, ShortageError
from cascade.machine import is_out_of_memory
from cascade.training.accelerator import any_process


def check_batch(pass_size: int, accelerator: Accelerator) -> None:
    """Raise CascadeError unless the pictures of a pass divide evenly among the processes."""
    processes = accelerator.num_processes
    if pass_size % processes:
        raise CascadeError(
            f"training.batch_size / training.accumulation = {pass_size} does not divide among {processes} processes;"
            f" make it a multiple of {processes}, or start another number of processes"
        )


class Views(Protocol):
    """View numbers and captions of a batch."""

    @property
    def samples(self) -> Sequence[int]:
        """The view numbers in the run."""

    @property
    def captions(self) -> Sequence[str]:
        """The captions, in the same order."""


def check_finite(loss: Tensor, step: int, batch: Views, accelerator: Accelerator) -> None:
    """Raise CascadeError in every process when a loss (B,) is not finite in any; each names its own views."""
    finite = torch.isfinite(loss).flatten()
    # Every process must stop, not only the one with the bad loss, or the others wait forever.
    if any_process(accelerator, not bool(finite.all())):
        bad = [sample for sample, ok in zip(batch.samples, finite.tolist(), strict=True) if not ok]
        captions = [caption for caption, ok in zip(batch.captions, finite.tolist(), strict=True) if not ok]
        where = f"views {bad} ({captions[:3]})" if bad else "in another process, which names the views"
        raise CascadeError(
            f"the loss is not finite at step {step}, {where}; the last checkpoint is intact."
            " Lower training.optimizer.learning_rate, or use training.precision=fp32"
        )


def check_gradient(norm: float, step: int, precision: str) -> None:
    """Raise CascadeError for a gradient that is not finite, before weights changed by it are saved.

    fp16's loss scaling skips such steps by itself.
    """
    if not math.isfinite(norm) and precision != "fp16":
        raise CascadeError(
            f"the gradient is not finite at step {step}, though the loss is; the last checkpoint is intact."
            " Lower training.optimizer.learning_rate, or use training.precision=fp32"
        )


_SMALLER_STEPS = (
    "raise training.accumulation, which gives the same steps in smaller passes, or set"
    " training.activation_checkpointing=true; the last checkpoint is intact"
)


@contextmanager
def shortage_as_error(when: str = "in training", way_out: str = _SMALLER_STEPS) -> Iterator[None]:
    """Turn an out-of-memory error into a ShortageError with a way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ShortageError(f"out of memory {when} ({_first_line(error)}); {way_out}") from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
