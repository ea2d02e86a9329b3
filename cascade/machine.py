"""Which GPU is ours and what it can; the memory that is left to us, of it, of the machine; and how its end is known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def own_gpu() -> torch.device | None:
    """The GPU of this process, None where there is none.

    Of processes that were launched together each has its own, by its number on this machine (LOCAL_RANK); where each is
    shown one GPU alone, as Slurm can have it, that one.
    """
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself: of NVIDIA's GPUs those since Ampere, of Apple's since macOS 14.

    Older ones, such as T4 and V100, only imitate it, slower than float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def name_of(device: torch.device) -> str:
    """What people call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device}"


def free_bytes(device: torch.device | None = None) -> int:
    """Memory that a device has left, of a GPU also what torch has reserved there and does not use.

    None: our GPU if there is one, else the machine or our part of it.
    """
    device = device or own_gpu() or torch.device("cpu")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([psutil.virtual_memory().available, *control_group_free_bytes()])


# "not enough" and "can't allocate" are torch's for a CPU, on Windows and elsewhere.
_SHORTAGES = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that something smaller could fit."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES):
        return True
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


_LIMITS = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
"""Names of a control group's limit and use, and what its sums begin with: of version 2, of version 1."""


def control_group_free_bytes(root: Path = Path("/")) -> list[int]:
    """What each limit leaves that a container or a batch system such as Slurm set for us; empty where there is none.

    root: where /proc and /sys are. Source: cgroup-v2.rst and cgroup-v1/memory.rst of the kernel's admin guide.
    """
    found = []
    for folder in _control_groups(root):
        for limit, use, total in _LIMITS:
            # "max", files that are not there or not ours to read: no limit that we know of.
            with suppress(OSError, ValueError):
                used = int((folder / use).read_text(encoding="utf-8")) - _file_pages(folder / "memory.stat", total)
                found.append(max(int((folder / limit).read_text(encoding="utf-8")) - used, 0))
    return found


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of our control group and of those around it, whose limits hold for us as well."""
    mounted, listing = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    lines: list[str] = []
    with suppress(OSError):  # not there, or not ours to read
        lines = listing.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = mounted / controllers
            # Inside a container the path may be the machine's, of which only the top is to be seen.
            place = top / path.lstrip("/")
            yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(top))


def _file_pages(stat: Path, total: str) -> int:
    """Bytes of read files that a control group's use counts, and that give way to whoever needs memory."""
    numbers = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    return sum(int(numbers.get(f"{total}{kind}_file", 0)) for kind in ("inactive", "active"))
