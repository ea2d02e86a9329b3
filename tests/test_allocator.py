"""Freed memory stays with the process, where the C library supports it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from cascade.system.process import keep_freed_memory

def use() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * 50_000_000 for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = sys.argv[1] == "keep" and keep_freed_memory()
use()
print(kept, use())
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def faults(mode: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of writing 200 MB that were written and freed before."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    kept, few = faults("keep")
    left, many = faults("leave")
    assert kept
    assert not left
    assert few < many / 10


def test_who_set_the_allocator_by_the_environment_keeps_that() -> None:
    assert not faults("keep", MALLOC_ARENA_MAX="4")[0]
