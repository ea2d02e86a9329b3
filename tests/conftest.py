"""Puts tests/ on the import path by its location, so that every test can import the helpers_*.py next to it."""

import os
import tempfile
from pathlib import Path

import pytest

# Each worker of pytest-xdist computes with one thread: between two processes, two threads wait more than they work.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# What is remembered of a machine is remembered for these tests alone, in processes that they start as well.
_CACHE = str(Path(tempfile.gettempdir()) / "cascade-tests")
os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = _CACHE


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core for the whole suite; none for single files, which finish before workers have started."""
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
