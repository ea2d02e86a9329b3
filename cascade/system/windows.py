"""Windows: files that are open cannot be replaced, locks keep others from reading, folders are not synced."""

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

assert sys.platform == "win32", "the other systems have a module of their own"

CHILD_ENDED: int | None = None
"""There is no signal by which Windows says that a child process has ended."""

STOP_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGBREAK)
"""Signals, other than Ctrl-C, that ask a program to stop: Ctrl-Break is the one that others can send."""

# --- locks: they belong to whoever opened the file, and end with the process
#
# What is locked nobody else can read. So locks lie far behind what our files hold, below 2 GiB, where the C library's
# offsets are safe. All are exclusive: a file is shared by locking one of many places, and had alone by locking them
# all, both behind a gate that is held for a moment only.

_BYTES = 1 << 30
_GATE = (1 << 31) - (1 << 16)
_SHARES = 1024  # processes that can share a file
_POLL_SECONDS = 0.01
_MOMENT_SECONDS = 1.0  # the locks of a process that was killed end a moment after it
_position = threading.Lock()  # of a file: to go there and to act there are two calls
_held: dict[int, tuple[int, int]] = {}
"""(start, length) of the part of a file by which each handle holds it."""


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, alone or shared with others; one that is held is changed. Returns whether it is ours now.

    Raises OSError where the file system has no locks.
    """
    return _until(lambda: _try_lock(handle, shared), None if wait else _MOMENT_SECONDS)


def unlock(handle: int) -> None:
    """Let others lock it."""
    if handle in _held:
        _place(handle, msvcrt.LK_UNLCK, *_held.pop(handle))


def lock_byte(handle: int, number: int, *, wait: bool = False) -> bool:
    """Lock one byte of a file, which need not be that long, against other processes. Returns whether it is ours."""
    return _until(lambda: _place(handle, msvcrt.LK_NBLCK, _BYTES + number, 1), None if wait else 0)


def unlock_byte(handle: int, number: int) -> None:
    """Let others lock it."""
    _place(handle, msvcrt.LK_UNLCK, _BYTES + number, 1)


def after_fork(action: Callable[[], None]) -> None:
    """Processes are not forked here."""


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
    """Try again until something succeeds, for a time or, with None, for ever."""
    start = time.monotonic()
    while not action():
        if seconds is not None and time.monotonic() - start >= seconds:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _place(handle: int, mode: int, start: int, length: int) -> bool:
    """Lock or unlock a part of a file; False where another holds some of it, or nobody what is to be unlocked."""
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
"""Whether a file that a program has open can be neither removed nor replaced."""


def open_to_read(path: str | Path) -> int:
    """A handle of a file, which other programs that we start do not get."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return os.open(path, os.O_RDONLY | os.O_BINARY | os.O_NOINHERIT)


def read_at(handle: int, length: int, start: int) -> bytes:
    """At most `length` bytes from `start` on, also while other threads read and write."""
    with _position:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, length)


def write_at(handle: int, content: bytes, start: int) -> None:
    """Write in the middle of a file."""
    with _position:
        os.lseek(handle, start, os.SEEK_SET)
        os.write(handle, content)


def sync(path: Path) -> None:
    """Have a file survive a power cut. The names in a folder cannot be asked for: NTFS keeps a journal of them."""
    if path.is_dir():
        return
    handle = os.open(path, os.O_RDWR | os.O_BINARY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_PATIENCE_SECONDS = 5.0


def replace(source: Path, target: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced in one go.

    A moment's patience for readers and virus scanners, which keep files open that have just been written.
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


def is_same_file(handle: int, path: Path) -> bool:  # noqa: ARG001 - what is open cannot be replaced
    """Whether an open file is the one that has a name now. Raises FileNotFoundError when none has."""
    path.stat()
    return True


def cache_folder() -> Path:
    """Where programs of a user keep what can be made anew."""
    return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")


# --- memory


def c_library() -> ctypes.CDLL | None:
    """None: of the C libraries of this process none has what we would ask for."""
    return None


def shared_memory() -> tuple[Path, int] | None:
    """(where processes share memory, how many bytes are free there); None: it has no limit of its own."""
    return None
