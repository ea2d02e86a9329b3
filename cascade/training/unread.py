"""Values of steps that stay on the device until they are needed: reading one waits for all queued GPU work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_UNREAD = 100
"""Steps after which their values are read in any case: they take memory, and show a loss that is not finite."""


@dataclass(frozen=True)
class Unread:
    """The values of one step: loss and log SNR (B,) of this process' pictures, and the gradient norm of all processes.

    samples, captions: of the pictures.
    """

    step: int
    losses: Tensor
    log_snrs: Tensor
    norm: Tensor
    samples: Sequence[int]
    captions: Sequence[str]


@dataclass(frozen=True)
class Numbers:
    """The values after reading: `losses` and `log_snrs` of the pictures of all processes, process by process."""

    step: Unread
    own_losses: Tensor
    losses: list[float]
    log_snrs: list[float]
    norm: float


def read(steps: Sequence[Unread], accelerator: Accelerator) -> list[Numbers]:
    """The values of several steps, in order, read together. All processes together."""
    own = torch.stack([torch.stack([step.losses, step.log_snrs]) for step in steps])  # (steps, 2, B)
    gathered = accelerator.gather(own).cpu().unflatten(0, (-1, len(steps)))  # (processes, steps, 2, B)
    values = gathered.permute(1, 2, 0, 3).flatten(2).tolist()  # (steps, 2, B of all)
    norms = torch.stack([torch.as_tensor(step.norm) for step in steps]).tolist()
    mine = gathered[accelerator.process_index, :, 0]
    return [
        Numbers(step, own_losses, losses, log_snrs, norm)
        for step, own_losses, (losses, log_snrs), norm in zip(steps, mine, values, norms, strict=True)
    ]
