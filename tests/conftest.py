"""Standing here, this file puts tests/ on the import path: every test finds the helpers_*.py beside it."""

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
    """A worker a core for the whole suite; none for single files, which are done before workers have started."""
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
