"""Locks of the kernel: they die with the process that holds them, so a killed run leaves none behind."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from cascade import system
from cascade.errors import CascadeError
from cascade.locks import take

_DONE = b"\1"
_PATIENCE_SECONDS = 2.0  # for the first process of our own launch to say that it is ours


class RunLock:
    """Who may write into a folder: one process, or all of one launch.

    The first to come holds the lock alone, prepares the folder, and then shares the lock with its launch.
    """

    def __init__(self, path: Path, launch: str | None) -> None:
        """launch: names the processes that belong together; None: this one alone."""
        self._file = path.open("a+", encoding="utf-8")
        self._path, self._launch = path, launch
        self.first = False

    def acquire(self) -> None:
        """Raises CascadeError when another run holds it. `first` says whether we have to prepare the folder."""
        start = time.monotonic()
        while not take(self._file.fileno(), self._path, wait=False):
            holder = self._holder()
            if self._launch is not None and holder == self._launch:
                take(self._file.fileno(), self._path, shared=True)  # waits while the first one prepares
                return
            if time.monotonic() - start > _PATIENCE_SECONDS or self._launch is None:
                raise CascadeError(
                    f"{self._path.parent.parent}: another run writes into this folder ({holder}); wait for it, or name"
                    " another folder with --out"
                )
            time.sleep(0.05)
        # A launch of which the first processes are done already has prepared the folder.
        self.first = self._launch is None or self._holder() != self._launch
        self._file.truncate(0)
        self._file.write(self._launch or f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def share(self) -> None:
        """The folder is prepared: let the others of the launch in."""
        if self._launch is not None:
            take(self._file.fileno(), self._path, shared=True)

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read()


class Claims:
    """Who works on which number: a lock on one byte of a file each, which a dead process loses.

    The byte itself says whether the work on its number is done.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b", buffering=0)

    def take(self, number: int) -> bool:
        """Whether nobody else works on it, and now we do. Raises OSError where the file system has no locks."""
        return system.lock_byte(self._file.fileno(), number)

    def wait(self, number: int) -> None:
        """Until nobody works on it."""
        system.lock_byte(self._file.fileno(), number, wait=True)
        self.release(number)

    def is_done(self, number: int) -> bool:
        """Whether a process of this run has finished it."""
        return system.read_at(self._file.fileno(), 1, number) == _DONE

    def finish(self, number: int) -> None:
        """It is done, and we no longer work on it."""
        system.write_at(self._file.fileno(), _DONE, number)
        self.release(number)

    def clear(self) -> None:
        """Nothing is done."""
        self._file.truncate(0)

    def release(self, number: int) -> None:
        """We no longer work on it."""
        system.unlock_byte(self._file.fileno(), number)

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()


def processes() -> tuple[int, int, str | None]:
    """(our number, how many processes, a name for them all), as accelerate and torchrun tell their processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return 0, 1, None
    here = count == int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    place = f"{socket.gethostname()} {os.getppid()}" if here else os.environ.get("TORCHELASTIC_RUN_ID", "")
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return int(os.environ.get("RANK", "0")), count, f"launch of {count} processes at {address} {place}".rstrip()
