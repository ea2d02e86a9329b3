"""Linux, macOS and other systems that have flock, fsync and signals."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

assert sys.platform != "win32", "Windows has its own module"

CHILD_ENDED: int | None = signal.SIGCHLD
"""The signal that reports the end of a child process."""

STOP_SIGNALS: tuple[int, ...] = (signal.SIGTERM,)
"""Signals, other than Ctrl-C, that request a program to stop."""

# --- locks: they belong to the opened file's handle, and end with the process


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, exclusively or shared; a lock already held is converted. Returns whether it was locked.

    Raises OSError on a file system without locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int) -> None:
    """Release the lock."""
    fcntl.flock(handle, fcntl.LOCK_UN)


def lock_byte(handle: int, number: int, *, wait: bool = False) -> bool:
    """Lock one byte of a file, which may be beyond its end, against other processes. Returns whether it was locked."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):  # depends on the system
        return False
    return True


def unlock_byte(handle: int, number: int) -> None:
    """Release the byte's lock."""
    fcntl.lockf(handle, fcntl.LOCK_UN, 1, number)


def after_fork(action: Callable[[], None]) -> None:
    """Register an action that a forked child runs before anything else."""
    os.register_at_fork(after_in_child=action)


# --- files

OPEN_FILES_STAY = False
"""Whether an open file can be neither removed nor replaced."""


def open_to_read(path: str | Path) -> int:
    """A handle of a file for reading, which child processes do not inherit; opening a pipe does not block."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def read_at(handle: int, length: int, start: int) -> bytes:
    """At most `length` bytes beginning at `start`, even while other threads read and write."""
    return os.pread(handle, length, start)


def write_at(handle: int, content: bytes, start: int) -> None:
    """Write at a position in a file."""
    os.pwrite(handle, content, start)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a power cut does not lose them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder; an existing file with the new name is replaced atomically."""
    source.replace(target)


_EXCHANGE = 2
"""Linux's RENAME_EXCHANGE, and macOS' RENAME_SWAP."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one operation; False where the system or the disk cannot."""
    library = c_library()
    name = "renamex_np" if sys.platform == "darwin" else "renameat2"
    function = getattr(library, name, None)
    if function is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    here = ctypes.c_int(-100)  # AT_FDCWD: paths are those of this process
    arguments = paths if sys.platform == "darwin" else (here, paths[0], here, paths[1])
    return bool(function(*arguments, ctypes.c_uint(_EXCHANGE)) == 0)


def is_same_file(handle: int, path: Path) -> bool:
    """Whether a path now names this open file. Raises FileNotFoundError if the path does not exist."""
    return os.path.samestat(os.fstat(handle), path.stat())


def cache_folder() -> Path:
    """The user's folder for files that programs can create again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


# --- memory


def c_library() -> ctypes.CDLL | None:
    """The C library of this process; None if it is not accessible."""
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


def shared_memory() -> tuple[Path, int] | None:
    """(folder of shared memory, free bytes there); None if shared memory has no separate limit.

    A missing folder, as in some containers, has 0 bytes free.
    """
    if sys.platform != "linux":
        return None
    place = Path("/dev/shm")
    try:
        return place, shutil.disk_usage(place).free
    except OSError:
        return place, 0
