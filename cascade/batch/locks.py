"""Kernel locks for a run and its units of work: they end with their process, so a killed run leaves none behind."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from cascade import system
from cascade.errors import CascadeError
from cascade.files.text import check_regular
from cascade.locks import note_holder, take

_DONE = b"\1"
_PATIENCE_SECONDS = 2.0  # for the first process of this launch to write its name into the lock


class RunLock:
    """The right to write into a folder, held by one process or by all processes of one launch.

    The first process holds the lock exclusively, prepares the folder, and then shares the lock with its launch.
    """

    def __init__(self, path: Path, launch: str | None) -> None:
        """launch: name shared by the processes of a launch; None: this process alone."""
        self._file = check_regular(path).open("a+", encoding="utf-8")
        self._path, self._launch = path, launch
        self.first = False

    def acquire(self) -> None:
        """Take the lock and set `first`. Raises CascadeError when another run holds it."""
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
        # If earlier processes of this launch have already finished, they have prepared the folder.
        self.first = self._launch is None or self._holder() != self._launch
        note_holder(self._file.fileno(), self._launch or f"process {os.getpid()} on {socket.gethostname()}")

    def share(self) -> None:
        """Let the other processes of the launch in, now that the folder is prepared."""
        if self._launch is not None:
            take(self._file.fileno(), self._path, shared=True)

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read()


class Claims:
    """Locks on numbered units of work: one byte of a file per unit; the locks of a dead process are released.

    The byte's value records whether the unit is finished.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path).touch()
        self._file = path.open("r+b", buffering=0)

    def take(self, number: int) -> bool:
        """Lock a unit; returns False if another process has it. Raises OSError on a file system without locks."""
        return system.lock_byte(self._file.fileno(), number)

    def wait(self, number: int) -> None:
        """Wait until no process has the unit."""
        system.lock_byte(self._file.fileno(), number, wait=True)
        self.release(number)

    def is_done(self, number: int) -> bool:
        """Whether a process of this run has finished the unit."""
        return system.read_at(self._file.fileno(), 1, number) == _DONE

    def finish(self, number: int) -> None:
        """Mark the unit as finished and unlock it."""
        system.write_at(self._file.fileno(), _DONE, number)
        self.release(number)

    def clear(self) -> None:
        """Mark every unit as not finished."""
        self._file.truncate(0)

    def release(self, number: int) -> None:
        """Unlock the unit."""
        system.unlock_byte(self._file.fileno(), number)

    def close(self) -> None:
        """Release all locks."""
        self._file.close()


def processes() -> tuple[int, int, str | None]:
    """(rank, number of processes, name of the launch), from the variables that accelerate and torchrun set."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return 0, 1, None
    here = count == int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    place = f"{socket.gethostname()} {os.getppid()}" if here else os.environ.get("TORCHELASTIC_RUN_ID", "")
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return int(os.environ.get("RANK", "0")), count, f"launch of {count} processes at {address} {place}".rstrip()
