"""The C library's memory: what a program frees is soon asked for again."""

from __future__ import annotations

import os

from cascade import system

_MALLOPT = {-3: (1 << 30, 1 << 25), -1: ((1 << 31) - 1,), -2: (1 << 26,)}
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h: bytes to try, older versions take 32 MB."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep what this process frees for its next tensors, not to return it to the system.

    A training step frees its activations and asks for as many again; fetched anew, each of their pages costs a fault
    and a clearing. For a program that trains, at its start: a library leaves its host's allocator alone, and whoever
    draws wants memory back between stages. Does nothing, and returns False, with another C library or where the
    environment sets the allocator itself.
    """
    environment = [name for name in os.environ if name.startswith("MALLOC_")]
    if environment or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(system.c_library(), "mallopt", None)
    if mallopt is None:
        return False
    taken = [any(mallopt(option, value) == 1 for value in values) for option, values in _MALLOPT.items()]
    return all(taken)
