"""The device and number format of a run, its abilities and free memory, control group limits included."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

from cascade.errors import CascadeError, quoted

# --- the machine -----------------------------------------------------------------------------------------------------
# This process's GPU and its abilities; free memory, control group limits included; detection of memory shortage.


def own_gpu() -> torch.device | None:
    """The GPU of this process, or None.

    Processes launched together each have their own, numbered by LOCAL_RANK; a process that can see only one GPU, as
    Slurm may arrange, uses that one.
    """
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes bfloat16 natively: NVIDIA's GPUs since Ampere, Apple's since macOS 14.

    Older ones, such as T4 and V100, emulate it, slower than float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def name_of(device: torch.device) -> str:
    """The device's product name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device}"


def free_bytes(device: torch.device | None = None) -> int:
    """Free memory of a device; for a GPU, including memory that torch has reserved there and does not use.

    None: this process's GPU if there is one, else the machine, or the control group's share of it.
    """
    device = device or own_gpu() or torch.device("cpu")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([psutil.virtual_memory().available, *control_group_free_bytes()])


# "not enough" and "can't allocate" are torch's words for a CPU, on Windows and elsewhere.
_SHORTAGES = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, so that something smaller could fit."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES):
        return True
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


_LIMITS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""Names of a control group's limit and use, and the prefix of its totals: version 2, then version 1."""


def control_group_free_bytes(root: Path = Path("/")) -> list[int]:
    """Memory left under each limit that a container or batch system (Slurm, say) sets for this process; may be empty.

    root: folder with /proc and /sys. Source: cgroup-v2.rst and cgroup-v1/memory.rst in the kernel's admin guide.
    """
    found = []
    for folder in _control_groups(root):
        for limit, use, total in _LIMITS:
            # The limit "max", and files that are missing or unreadable, mean no limit that we know of.
            with suppress(OSError, ValueError):
                used = int((folder / use).read_text(encoding="utf-8")) - _file_pages(folder / "memory.stat", total)
                found.append(max(int((folder / limit).read_text(encoding="utf-8")) - used, 0))
    return found


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control group and of its ancestors, whose limits apply as well."""
    mounted, listing = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    lines: list[str] = []
    with suppress(OSError):  # missing or unreadable
        lines = listing.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = mounted / controllers
            # Inside a container the path may be the host's, and only its top folder is visible.
            place = top / path.lstrip("/")
            yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(top))


def _file_pages(stat: Path, total: str) -> int:
    """Bytes of cached file pages, which a control group counts as used but which the kernel frees on demand."""
    numbers = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    return sum(int(numbers.get(f"{total}{kind}_file", 0)) for kind in ("inactive", "active"))


# --- device ----------------------------------------------------------------------------------------------------------
# The choice of a device and a number format.

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
