"""Windows: open files cannot be replaced, locks prevent reading, folders are not synced."""

from __future__ import annotations

import ctypes
import errno
import msvcrt
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

assert sys.platform == "win32", "the other systems have their own module"

CHILD_ENDED: int | None = None
"""Windows has no signal that reports the end of a child process."""

STOP_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGBREAK)
"""Signals, other than Ctrl-C, that request a program to stop; other programs can send Ctrl-Break."""

# --- locks: they belong to the opened file's handle, and end with the process
#
# No other process can read a locked range. So locks are far beyond the end of the files, below 2 GiB, where the C
# library's offsets are safe. All locks are exclusive: to share a file, a process locks one of many bytes; to have it
# alone, it locks them all. A gate byte, held only briefly, protects both operations.

_BYTES = 1 << 30
_GATE = (1 << 31) - (1 << 16)
_SHARES = 1024  # maximum number of processes that share a file
_POLL_SECONDS = 0.01
_MOMENT_SECONDS = 1.0  # the locks of a killed process are released shortly after its end
_position = threading.Lock()  # protects a file's position: seeking and acting are two calls
_held: dict[int, tuple[int, int]] = {}
"""(start, length) of the range that each handle has locked."""


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, exclusively or shared; a lock already held is converted. Returns whether it was locked.

    Raises OSError on a file system without locks.
    """
    return _until(lambda: _try_lock(handle, shared), None if wait else _MOMENT_SECONDS)


def unlock(handle: int) -> None:
    """Release the lock."""
    if handle in _held:
        _place(handle, msvcrt.LK_UNLCK, *_held.pop(handle))


def lock_byte(handle: int, number: int, *, wait: bool = False) -> bool:
    """Lock one byte of a file, which may be beyond its end, against other processes. Returns whether it was locked."""
    return _until(lambda: _place(handle, msvcrt.LK_NBLCK, _BYTES + number, 1), None if wait else 0)


def unlock_byte(handle: int, number: int) -> None:
    """Release the byte's lock."""
    _place(handle, msvcrt.LK_UNLCK, _BYTES + number, 1)


def after_fork(action: Callable[[], None]) -> None:
    """Does nothing: Windows does not fork processes."""


def _try_lock(handle: int, shared: bool) -> bool:
    if not _place(handle, msvcrt.LK_NBLCK, _GATE, 1):
        return False
    try:
        unlock(handle)
        places = [(_GATE + 1 + share, 1) for share in range(_SHARES)] if shared else [(_GATE + 1, _SHARES)]
        for start, length in places:
            if _place(handle, msvcrt.LK_NBLCK, start, length):
                _held[handle] = start, length
                return True
        return False
    finally:
        _place(handle, msvcrt.LK_UNLCK, _GATE, 1)


def _until(action: Callable[[], bool], seconds: float | None) -> bool:
    """Repeat an action until it succeeds, for a number of seconds or, with None, for ever."""
    start = time.monotonic()
    while not action():
        if seconds is not None and time.monotonic() - start >= seconds:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _place(handle: int, mode: int, start: int, length: int) -> bool:
    """Lock or unlock a range of a file; returns False if another process has some of it, or if it was not locked."""
    with _position:
        before = os.lseek(handle, 0, os.SEEK_CUR)
        os.lseek(handle, start, os.SEEK_SET)
        try:
            msvcrt.locking(handle, mode, length)
        except PermissionError:
            return False
        finally:
            os.lseek(handle, before, os.SEEK_SET)
    return True


# --- files

OPEN_FILES_STAY = True
"""Whether an open file can be neither removed nor replaced."""


def open_to_read(path: str | Path) -> int:
    """A handle of a file for reading, which child processes do not inherit."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return os.open(path, os.O_RDONLY | os.O_BINARY | os.O_NOINHERIT)


def read_at(handle: int, length: int, start: int) -> bytes:
    """At most `length` bytes beginning at `start`, even while other threads read and write."""
    with _position:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, length)


def write_at(handle: int, content: bytes, start: int) -> None:
    """Write at a position in a file."""
    with _position:
        os.lseek(handle, start, os.SEEK_SET)
        os.write(handle, content)


def sync(path: Path) -> None:
    """Flush a file to the disk. Folders cannot be synced, but NTFS keeps a journal of names."""
    if path.is_dir():
        return
    handle = os.open(path, os.O_RDWR | os.O_BINARY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_PATIENCE_SECONDS = 5.0


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder; an existing file with the new name is replaced atomically.

    Tries again for a moment, because readers and virus scanners keep newly written files open.
    """
    start = time.monotonic()
    while True:
        try:
            source.replace(target)
        except PermissionError:
            if time.monotonic() - start >= _PATIENCE_SECONDS:
                raise
            time.sleep(_POLL_SECONDS)
        else:
            return


def exchange(one: Path, other: Path) -> bool:  # noqa: ARG001 - of the other systems
    """False: Windows cannot exchange the names of two folders in one operation."""
    return False


def is_same_file(handle: int, path: Path) -> bool:  # noqa: ARG001 - an open file cannot be replaced
    """Whether a path now names this open file. Raises FileNotFoundError if the path does not exist."""
    path.stat()
    return True


def cache_folder() -> Path:
    """The user's folder for files that programs can create again."""
    return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")


# --- memory


def c_library() -> ctypes.CDLL | None:
    """None: no C library on Windows has the function that would be called."""
    return None


def shared_memory() -> tuple[Path, int] | None:
    """None: shared memory has no separate limit."""
    return None
