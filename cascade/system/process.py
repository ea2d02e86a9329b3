"""This process: its allocator, how its threads wait, and requests to stop it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from cascade import system
from cascade.system import STOP_SIGNALS

# --- allocator -------------------------------------------------------------------------------------------------------
# Settings of the C library's allocator: keep freed memory for the next tensors.

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


# --- threads ---------------------------------------------------------------------------------------------------------
# How torch's threads wait for each other, set before torch is imported.
#
# OpenMP's threads spin at the end of every parallel section until the last one arrives. With one core per thread that
# is fastest. If another program occupies a core, the spinning thread keeps the late one from running, thousands of
# times per picture: on two busy cores a picture takes five times as long as with threads that sleep instead.

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
_SECONDS = 0.05  # five ticks of most systems' clock for each core
_BUSY = 0.5


def wait_asleep_on_a_busy_machine() -> bool:
    """Let waiting threads sleep if other programs use half a core or more; returns whether they will.

    Does nothing if the environment already sets the number of threads or how they wait. The bytes of pictures do not
    depend on it.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    if psutil.cpu_percent(_SECONDS) / 100 * (psutil.cpu_count() or 1) < _BUSY:
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


# --- stop signals ----------------------------------------------------------------------------------------------------
# Requests to stop: Ctrl-C, SIGTERM from schedulers, Ctrl-Break on Windows.


class Stopped(Exception):  # noqa: N818 - it is no error
    """An action between two steps was abandoned because the run was asked to stop."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Context in which Ctrl-C and STOP_SIGNALS request a stop after the current step; a second Ctrl-C stops at once.

    Yields a function that returns whether a request was received.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a signal handler
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGINT, *STOP_SIGNALS)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
