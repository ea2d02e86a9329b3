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

assert sys.platform != "win32", "Windows has a module of its own"

CHILD_ENDED: int | None = signal.SIGCHLD
"""The signal by which a system says that a child process has ended."""

STOP_SIGNALS: tuple[int, ...] = (signal.SIGTERM,)
"""Signals, other than Ctrl-C, that ask a program to stop."""

# --- locks: they belong to whoever opened the file, and end with the process


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file, alone or shared with others; one that is held is changed. Returns whether it is ours now.

    Raises OSError where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int) -> None:
    """Let others lock it."""
    fcntl.flock(handle, fcntl.LOCK_UN)


def lock_byte(handle: int, number: int, *, wait: bool = False) -> bool:
    """Lock one byte of a file, which need not be that long, against other processes. Returns whether it is ours."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):  # which of them differs between systems
        return False
    return True


def unlock_byte(handle: int, number: int) -> None:
    """Let others lock it."""
    fcntl.lockf(handle, fcntl.LOCK_UN, 1, number)


def after_fork(action: Callable[[], None]) -> None:
    """Have a forked child do something before anything else."""
    os.register_at_fork(after_in_child=action)


# --- files

OPEN_FILES_STAY = False
"""Whether a file that a program has open can be neither removed nor replaced."""


def open_to_read(path: str | Path) -> int:
    """A handle of a file, which other programs that we start do not get; a pipe does not keep us waiting."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def read_at(handle: int, length: int, start: int) -> bytes:
    """At most `length` bytes from `start` on, also while other threads read and write."""
    return os.pread(handle, length, start)


def write_at(handle: int, content: bytes, start: int) -> None:
    """Write in the middle of a file."""
    os.pwrite(handle, content, start)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced in one go."""
    source.replace(target)


def is_same_file(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has a name now. Raises FileNotFoundError when none has."""
    return os.path.samestat(os.fstat(handle), path.stat())


def cache_folder() -> Path:
    """Where programs of a user keep what can be made anew."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


# --- memory


def c_library() -> ctypes.CDLL | None:
    """The C library of this process; None where it cannot be had."""
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


def shared_memory() -> tuple[Path, int] | None:
    """(where processes share memory, how many bytes are free there); None where there is no limit of its own.

    A place that is not there, as in some containers, has nothing free.
    """
    if sys.platform != "linux":
        return None
    place = Path("/dev/shm")
    try:
        return place, shutil.disk_usage(place).free
    except OSError:
        return place, 0
