"""Locks of the kernel on files: they die with the process that holds them, so a killed run leaves none behind."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

from cascade import system

logger = logging.getLogger("cascade.files")

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_files: WeakSet[TextIO] = WeakSet()
_told: set[Path] = set()


def _let_go() -> None:
    """A forked process shares its parent's locks, and would hold them on when the parent is killed."""
    for file in list(_files):
        file.close()


system.after_fork(_let_go)


def take(handle: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, alone or shared with others; one that is held is changed. Returns whether it is ours now.

    Where the file system has no locks, as some of clusters, it is ours, and a warning says once what that means.
    """
    try:
        return system.lock(handle, shared=shared, wait=wait)
    except OSError as error:
        _warn_or_raise(error, path)
        return True


def release(handle: int) -> None:
    """Let others take it."""
    with suppress(OSError):
        system.unlock(handle)


@contextmanager
def held(handle: int, path: Path) -> Iterator[None]:
    """An open file, locked against the other processes of a run for a moment."""
    take(handle, path)
    try:
        yield
    finally:
        release(handle)


@contextmanager
def lock_file(path: Path, wait: bool = True, holder: str = "") -> Iterator[None]:
    """Alone with a file that is there to be locked. Raises BlockingIOError when another has it and not `wait`.

    holder: what the file says of us to others meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if not take(file.fileno(), path, wait=wait):
            raise BlockingIOError(errno.EAGAIN, "another process has it", str(path))
        _files.add(file)
        if holder:
            file.truncate(0)
            file.write(holder)
            file.flush()
        try:
            yield
        finally:
            if not file.closed:
                release(file.fileno())


def _warn_or_raise(error: OSError, path: Path) -> None:
    if error.errno not in _NO_LOCKS:
        raise error
    if path.parent not in _told:
        _told.add(path.parent)
        logger.warning("%s: no locks on this file system; see that no other run writes into this folder", path.parent)
