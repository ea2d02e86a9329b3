"""Where to compute, and in which number format."""

from __future__ import annotations

import torch

from cascade.errors import CascadeError


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or a GPU if there is one. Raises CascadeError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target).item()  # `meta` has no values
    except (RuntimeError, AssertionError, TypeError) as error:
        raise CascadeError(f"device: {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The number format asked for, or float32 on a CPU and bfloat16 on a GPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise CascadeError(f"dtype: {name!r}; expected one of {', '.join(known)}")
    if name == "float16" and device.type == "cpu":
        raise CascadeError("dtype: float16 needs a GPU; on a CPU use bfloat16")
    return known[name]
