"""Locks of the kernel on files: they die with the process that holds them, so a killed run leaves none behind."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held(handle: int) -> Iterator[None]:
    """An open file, locked against the other processes of a run for a moment."""
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Alone with a file that is there to be locked. Raises BlockingIOError when another has it and not `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
