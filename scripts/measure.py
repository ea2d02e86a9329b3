"""Shared measurements of the benchmarks: time, the machine's convolution peak, arithmetic, memory."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

WIDTHS = ((64, 64), (128, 32), (192, 32), (256, 16))
"""(channels, size) of the convolutions of the peak."""


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of `action`, after a warm-up call."""
    action()
    return statistics.median(once(action) for _ in range(repeats))


def once(action: Callable[[], object]) -> float:
    """Seconds of one call, including its queued GPU work."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def convolution_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best GFLOP/s of 3x3 convolutions, channels-last."""
    best = 0.0
    for channels, size in WIDTHS:
        x = torch.randn(8, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2 * 9 * channels**2 * size**2 * 8
        best = max(best, flops / seconds(lambda x=x, w=weight: F.conv2d(x, w, padding=1), 15) / 1e9)
    return best


def count_gflop(action: Callable[[], object]) -> float:
    """GFLOP of matrix products and convolutions in a call, backward passes in it included."""
    # On a CPU torch counts only the plain attention kernel; the products are the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def peak_memory() -> float:
    """Largest resident size of this process so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def load_average() -> float:
    """Number of processes that want a core; it should be about 0 before a measurement."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
