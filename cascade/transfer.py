"""Copies to a GPU for which nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """The tensor on a device; None: where it is. From the CPU to a GPU the copy is queued, and the program goes on.

    A plain `.to` waits until the GPU has done all that was asked of it before. From pinned memory the copy also runs
    beside the GPU's work; torch keeps the pinned copy until it is done. Apple's GPUs are copied to at once: they share
    the memory, and there a queued copy reads what may have been freed.
    """
    target = tensor.device if device is None else torch.device(device)
    if tensor.device.type != "cpu" or target.type in ("cpu", "mps"):
        return tensor.to(target)
    return (tensor.pin_memory() if target.type == "cuda" else tensor).to(target, non_blocking=True)
