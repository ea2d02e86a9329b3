"""Locks of the kernel on files: they die with the process that holds them, so a killed run leaves none behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

_files: WeakSet[TextIO] = WeakSet()


def _let_go() -> None:
    """A forked process shares its parent's locks, and would hold them on when the parent is killed."""
    for file in list(_files):
        file.close()


os.register_at_fork(after_in_child=_let_go)


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
def lock_file(path: Path, wait: bool = True, holder: str = "") -> Iterator[None]:
    """Alone with a file that is there to be locked. Raises BlockingIOError when another has it and not `wait`.

    holder: what the file says of us to others meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        _files.add(file)
        if holder:
            file.truncate(0)
            file.write(holder)
            file.flush()
        yield
