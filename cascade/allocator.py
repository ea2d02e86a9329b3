"""Settings of the C library's allocator: keep freed memory for the next tensors."""

from __future__ import annotations

import os

from cascade import system

_MALLOPT = {-3: (1 << 30, 1 << 25), -1: ((1 << 31) - 1,), -2: (1 << 26,)}
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h: values in order; old versions cap at 32 MB."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees for its next tensors, instead of returning it to the system.

    A training step frees its activations and allocates as many again. Memory that went back to the system costs a page
    fault and a clearing per page. Only a program that trains should call this, at its start: a library must not change
    its host's allocator, and drawing wants memory back between stages. Does nothing, and returns False, with another C
    library or where the environment configures the allocator itself.
    """
    environment = [name for name in os.environ if name.startswith("MALLOC_")]
    if environment or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(system.c_library(), "mallopt", None)
    if mallopt is None:
        return False
    taken = [any(mallopt(option, value) == 1 for value in values) for option, values in _MALLOPT.items()]
    return all(taken)
