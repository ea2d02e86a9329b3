"""Kernel locks on files, which end with their process, and temporary tables on disk."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakSet

from cascade import system
from cascade.errors import StorageError
from cascade.files.text import check_regular

# --- locks -----------------------------------------------------------------------------------------------------------
# Kernel locks on files: they end with the process that holds them, so a killed run leaves none behind.

logger = logging.getLogger("cascade.files")

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_files: WeakSet[TextIO] = WeakSet()
_warned: set[Path] = set()


def _release_all() -> None:
    """Release locks in a forked process: it shares its parent's and would keep them after the parent's end."""
    for file in list(_files):
        file.close()


system.after_fork(_release_all)


def take(handle: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, exclusively or shared; a lock already held is converted. Returns whether the lock was taken.

    On a file system without locks, such as that of some clusters, returns True and warns once.
    """
    try:
        return system.lock(handle, shared=shared, wait=wait)
    except OSError as error:
        _warn_or_raise(error, path)
        return True


def release(handle: int) -> None:
    """Release the lock."""
    with suppress(OSError):
        system.unlock(handle)


@contextmanager
def held(handle: int, path: Path) -> Iterator[None]:
    """A context that holds a lock on an open file against the other processes of a run."""
    take(handle, path)
    try:
        yield
    finally:
        release(handle)


@contextmanager
def lock_file(path: Path, wait: bool = True, holder: str = "") -> Iterator[None]:
    """A context with exclusive access to a lock file. Raises BlockingIOError if another process has it and not `wait`.

    holder: text about this process, written into the file for others to read meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with check_regular(path).open("a", encoding="utf-8") as file:
        if not take(file.fileno(), path, wait=wait):
            raise BlockingIOError(errno.EAGAIN, "another process has it", str(path))
        _files.add(file)
        if holder:
            note_holder(file.fileno(), holder)
        try:
            yield
        finally:
            if not file.closed:
                release(file.fileno())


def note_holder(handle: int, holder: str) -> None:
    """Write into a locked file whose it is. Nothing waits in a buffer, which a full disk would refuse a second time."""
    os.ftruncate(handle, 0)
    system.write_at(handle, holder.encode(), 0)


def holder_of(path: Path) -> str:
    """What the holder of a locked file noted in it; nothing where that cannot be read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def are_missing(error: OSError) -> bool:
    """Whether an error means that the file system does not support locks."""
    return error.errno in _NO_LOCKS


def _warn_or_raise(error: OSError, path: Path) -> None:
    if not are_missing(error):
        raise error
    if path.parent not in _warned:
        _warned.add(path.parent)
        logger.warning("%s: no locks on this file system; make sure no other run writes into this folder", path.parent)


# --- temporary tables ------------------------------------------------------------------------------------------------
# A temporary table on disk (SQLite), in a few MB of memory however large it grows.


class ScratchTable:
    """One table, in a temporary file that is deleted when it is closed. Threads may use it in turn."""

    def __init__(self, definition: str) -> None:
        """definition: SQL statement that creates the table."""
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": a temporary file
        for statement in ("PRAGMA synchronous = OFF", definition, "BEGIN"):
            self._database.execute(statement)

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement. Raises StorageError when the disk is full."""
        with _disk_errors():
            return self._database.execute(statement, values)

    def fill(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each of `rows`. Raises StorageError when the disk is full."""
        with _disk_errors():
            self._database.executemany(statement, rows)

    def close(self) -> None:
        """Remove the table."""
        self._database.close()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"a temporary table cannot be written: {error}; set SQLITE_TMPDIR to a folder with enough space"
        ) from None
