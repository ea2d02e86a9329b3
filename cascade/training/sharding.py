"""Sharded weights: under FSDP every process holds a part of each weight, but files hold whole weights.

All processes gather a whole tensor together, so nothing here may be called by the main process alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(
    tensors: Mapping[str, Tensor], keep: bool = True, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The full tensors by name, on `device` if given; {} if `keep` is False, for processes that only participate.

    Gathered one at a time, so that at most one full tensor is on the device in addition to the kept ones.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.to(device) if device is not None else full
    return gathered


def spread_like(own: Tensor, value: Tensor) -> Tensor:
    """This process' part of `value`, sharded like `own`; `value` itself if `own` is whole.

    If `value` has length 1 in the sharded dimension, every process holds all of it. Every process has read the same
    file, so nothing is sent.
    """
    if not isinstance(own, DTensor):
        return value
    placements = [
        Replicate() if isinstance(place, Shard) and value.shape[place.dim] != own.shape[place.dim] else place
        for place in own.placements
    ]
    return distribute_tensor(value.to(own.device), own.device_mesh, placements, src_data_rank=None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)
