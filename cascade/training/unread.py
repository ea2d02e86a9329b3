"""What steps leave on the device until it is wanted: reading a number waits for all that a GPU still has to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_UNREAD = 100
"""Steps after which their numbers are read, wanted or not: they take memory, and say whether the run is sound."""


@dataclass(frozen=True)
class Unread:
    """The numbers of one step: loss and log SNR (B,) of this process' pictures, and the gradient's norm, of all.

    samples, captions: which pictures they were.
    """

    step: int
    losses: Tensor
    log_snrs: Tensor
    norm: Tensor
    samples: Sequence[int]
    captions: Sequence[str]


@dataclass(frozen=True)
class Numbers:
    """The same, read: `losses` and `log_snrs` of the pictures of all processes, process by process."""

    step: Unread
    own_losses: Tensor
    losses: list[float]
    log_snrs: list[float]
    norm: float


def read(steps: Sequence[Unread], accelerator: Accelerator) -> list[Numbers]:
    """The numbers of steps, in their order, in one go. All processes together."""
    own = torch.stack([torch.stack([step.losses, step.log_snrs]) for step in steps])  # (steps, 2, B)
    gathered = accelerator.gather(own).cpu().unflatten(0, (-1, len(steps)))  # (processes, steps, 2, B)
    values = gathered.permute(1, 2, 0, 3).flatten(2).tolist()  # (steps, 2, B of all)
    norms = torch.stack([torch.as_tensor(step.norm) for step in steps]).tolist()
    mine = gathered[accelerator.process_index, :, 0]
    return [
        Numbers(step, own_losses, losses, log_snrs, norm)
        for step, own_losses, (losses, log_snrs), norm in zip(steps, mine, values, norms, strict=True)
    ]
