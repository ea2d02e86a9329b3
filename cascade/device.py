"""The choice of a device and a number format."""

from __future__ import annotations

import logging
from functools import cache

import torch

from cascade.errors import CascadeError
from cascade.machine import has_bfloat16, name_of, own_gpu
from cascade.quoting import quoted

logger = logging.getLogger("cascade.load")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The requested device, or a GPU if there is one; `cuda` without a number is this process's own GPU.

    Raises CascadeError for a device that cannot be used here.
    """
    own = own_gpu()
    if device is None:
        return own or torch.device("cpu")
    try:
        target = torch.device(device)
        if own is not None and str(target) == own.type:
            return own
        torch.empty(1, device=target).item()  # `meta` has no values
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CascadeError(f"device: {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The requested number format, or float32 on a CPU and bfloat16 on a GPU that supports it.

    Raises CascadeError for a format that does not exist, or that the device does not support.
    """
    if dtype is None and device.type != "cpu" and not has_bfloat16(device):
        _warn_of_float32(name_of(device))
        return torch.float32
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise CascadeError(f"dtype: {quoted(name)}; expected one of {', '.join(known)}, auto")
    if name == "float16" and device.type == "cpu":
        raise CascadeError("dtype: float16 needs a GPU; on a CPU use bfloat16")
    if name == "bfloat16" and device.type == "mps" and not has_bfloat16(device):  # NVIDIA's older GPUs imitate it
        raise CascadeError(f"dtype: {name_of(device)} does not support bfloat16; use float32, or float16")
    return known[name]


@cache
def _warn_of_float32(name: str) -> None:
    """Warn, once per device."""
    logger.warning("%s does not support bfloat16: using float32; float16 is faster if pictures stay finite", name)
