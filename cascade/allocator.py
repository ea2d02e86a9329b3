"""The C library's memory: what a program frees is soon asked for again."""

from __future__ import annotations

import ctypes
import os

_MALLOPT = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 1 << 26}
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h, in bytes."""


def keep_freed_memory() -> bool:
    """Ask glibc to keep what this process frees for its next tensors, not to return it to the system.

    A step frees its activations and asks for as many again; fetched anew, each of their pages costs a fault and a
    clearing. For a program's start, as that of the command line; a library leaves its host's allocator alone. Does
    nothing, and returns False, with another C library or where the environment sets MALLOC_... itself.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no libc to be had this way, or one without mallopt
        return False
    return all(mallopt(option, value) == 1 for option, value in _MALLOPT.items())
