"""Makes a Python process on Linux behave as far as possible like one on Windows, for `cascade` and for one folder.

If it is on PYTHONPATH, Python imports it at start-up, also in child processes. For modules of `cascade`, `sys.platform`
is then win32, Unix-only modules are missing, and `msvcrt` exists. In the folder EMULATED_DISK, open files can be
neither removed nor replaced, and only names valid on Windows are accepted. Processes are spawned, and reading or
writing text without an explicit encoding is an error.
"""

from __future__ import annotations

import builtins
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

DISK = os.environ["EMULATED_DISK"]

LISTS = (Path(__file__).parent / "unix_only.txt").read_text(encoding="utf-8")
UNIX_ONLY = {kind: set(names.split()) for kind, names in re.findall(r"^(\w+): ((?:.|\n  )*)", LISTS, re.MULTILINE)}
SIGNALS = {signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGINT, signal.SIGSEGV, signal.SIGTERM}
BREAK = signal.SIGUSR2  # has the part of SIGBREAK
UNIX_ONLY["signal"] |= {one.name for one in signal.Signals if one not in SIGNALS}


class Seen(ModuleType):
    """A module as imported by cascade."""

    def __init__(self, real: ModuleType, without: set[str], **instead: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update({"_real": real, "_without": without, **instead})

    def __getattr__(self, name: str) -> Any:
        if name in self._without:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


# --- locks: msvcrt's belong to whoever opened the file, as these of Linux do


class Locking(ModuleType):
    """The part of msvcrt that locks."""

    LK_UNLCK, LK_LOCK, LK_NBLCK, LK_RLCK, LK_NBRLCK = range(5)

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self._ours: set[tuple[int, int, int]] = set()

    def locking(self, handle: int, mode: int, length: int) -> None:
        """From where the file is read or written next. Raises PermissionError where another has it."""
        part = (handle, os.lseek(handle, 0, os.SEEK_CUR), length)
        if part[1] + length >= 1 << 31:
            raise OverflowError("the C library's offsets end here")
        if mode == self.LK_UNLCK and part not in self._ours:
            raise PermissionError(13, "not locked, or not this part")
        if mode not in (self.LK_UNLCK, self.LK_NBLCK):
            raise AssertionError("waits ten seconds, then gives up")
        kind = fcntl.F_UNLCK if mode == self.LK_UNLCK else fcntl.F_WRLCK
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, part[1], length, 0))
        except BlockingIOError:
            raise PermissionError(13, "locked") from None
        (self._ours.discard if mode == self.LK_UNLCK else self._ours.add)(part)


# --- the disk


def refuse_open(path: Any, *others: Any) -> None:
    for one in (path, *others):
        name = os.path.realpath(os.fsdecode(one))
        if name.startswith(DISK) and is_open(name):
            raise PermissionError(13, "The process cannot access the file because it is being used by another", name)


def is_open(name: str) -> bool:
    """Whether a test process has a file open or mapped, or any file in a folder."""
    return any(one == name or one.startswith(f"{name}/") for process in ours() for one in opened_by(process))


def ours() -> Iterator[Path]:
    group = os.getpgrp()
    for process in Path("/proc").iterdir():
        with suppress(OSError):  # it ends
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                yield process


def opened_by(process: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from (str(handle.readlink()) for handle in (process / "fd").iterdir())
        maps = (process / "maps").read_text(encoding="utf-8")
        yield from (line.split(maxsplit=5)[5] for line in maps.splitlines() if DISK in line)


def guarded(action: Callable[..., Any], paths: int) -> Callable[..., Any]:
    def act(*arguments: Any, **named: Any) -> Any:
        refuse_open(*arguments[:paths])
        return action(*arguments, **named)

    return act


RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_taken_by_windows(name: str) -> bool:
    """Whether a file name is valid. Source: "Naming Files, Paths, and Namespaces", Microsoft."""
    wrong = re.search(r'[<>:"|?*\\\x00-\x1f]', name) or name[-1:] in (".", " ") or RESERVED.fullmatch(name)
    return not wrong


def check_names(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "os.mkdir", "os.rename") or isinstance(arguments[0], int):
        return
    path = os.fsdecode(arguments[1 if event == "os.rename" else 0])
    if path.startswith(DISK) and not all(map(is_taken_by_windows, Path(path[len(DISK) :]).parts[1:])):
        raise OSError(22, "The filename, directory name, or volume label syntax is incorrect", path)


def signal_of_windows(number: int, handler: Any) -> Any:
    if number not in SIGNALS | {BREAK}:
        raise ValueError("invalid signal value")
    return signal.signal(number, handler)


SEEN = {
    "os": Seen(os, UNIX_ONLY["os"], name="nt", O_BINARY=0, O_NOINHERIT=0),
    "sys": Seen(sys, set(), platform="win32"),
    "signal": Seen(signal, UNIX_ONLY["signal"], SIGBREAK=BREAK, signal=signal_of_windows),
    "msvcrt": Locking(),
}
find = builtins.__import__


def import_for(name: str, space: Any = None, *arguments: Any, **named: Any) -> ModuleType:
    """`__import__` for modules of cascade."""
    if space and str(space.get("__package__", "")).partition(".")[0] == "cascade":
        if name in UNIX_ONLY["modules"]:
            raise ModuleNotFoundError(f"No module named {name!r} on Windows", name=name)
        if name in SEEN:
            return SEEN[name]
    return find(name, space, *arguments, **named)


def become_windows() -> None:
    builtins.__import__ = import_for
    for action, paths in ((os.replace, 2), (os.rename, 2), (os.remove, 1), (os.unlink, 1), (os.rmdir, 1)):
        setattr(os, action.__name__, guarded(action, paths))
    shutil._use_fd_functions = False  # Windows removes folders by their names
    sys.addaudithook(check_names)
    multiprocessing.set_start_method("spawn", force=True)
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"cascade(\.|$)")


become_windows()
