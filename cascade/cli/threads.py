"""How torch's threads wait for each other, set before torch is imported.

OpenMP's threads spin at the end of every parallel section until the last one arrives. With one core per thread that is
fastest. If another program occupies a core, the spinning thread keeps the late one from running, thousands of times per
picture: on two busy cores a picture takes five times as long as with threads that sleep instead.
"""

from __future__ import annotations

import os

import psutil

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
