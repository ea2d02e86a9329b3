"""Asynchronous copies from the CPU to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """The tensor on a device (None: where it is). From the CPU to a GPU the copy is queued, without waiting for it.

    A plain `.to` waits until the GPU has finished all earlier work. From pinned memory the copy also runs in parallel
    with the GPU's work; torch keeps the pinned copy until it is done. Copies to Apple's GPUs are immediate: they share
    the CPU's memory, and a queued copy there may read memory that was already freed.
    """
    target = tensor.device if device is None else torch.device(device)
    if tensor.device.type != "cpu" or target.type in ("cpu", "mps"):
        return tensor.to(target)
    return (tensor.pin_memory() if target.type == "cuda" else tensor).to(target, non_blocking=True)
