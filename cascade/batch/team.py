"""The processes of one launch, or a single one: locks, the right to write into a folder, division of the work."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from cascade import system
from cascade.batch.folder import Layout
from cascade.errors import CascadeError
from cascade.files.locks import are_missing, note_holder, take
from cascade.files.text import check_regular

# --- locks -----------------------------------------------------------------------------------------------------------
# Kernel locks for a run and its units of work: they end with their process, so a killed run leaves none behind.

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


# --- team ------------------------------------------------------------------------------------------------------------
# The processes of one launch, or a single one: the right to write into a folder, and the division of the work.


class Team:
    """Processes that share a folder. All that they hold is released when they end, even by a kill.

    rank: this process's number among `count`.
    """

    def __init__(self, state: Path, layout: Layout) -> None:
        """state: a folder for lock files; each shard has its own."""
        self._state, self._layout = state, layout
        self.rank, self.count, self._launch = processes()
        self._lock: RunLock | None = None
        self._claims: Claims | None = None
        self._drawing: Claims | None = None

    def enter(self) -> bool:
        """Take the folder; returns whether this process is the first and must prepare it before `let_in`.

        Raises CascadeError when another run has the folder, OSError when no lock can be written.
        """
        self._lock = RunLock(self._path("lock"), self._launch)
        self._lock.acquire()
        self._claims, self._drawing = Claims(self._path("claims")), Claims(self._path("drawing"))
        return self._lock.first

    def let_in(self, before: int) -> None:
        """Let the other processes in, now that the folder is prepared. before: the manifest's length in bytes."""
        assert self._lock is not None, "enter() comes first"
        self._opened(self._claims).clear()
        self._path("before").write_text(str(before), encoding="ascii")
        self._lock.share()

    def start(self) -> None:
        """Mark this process as drawing, so that others wait for it. Raises CascadeError if work cannot be shared."""
        if self.count == 1:
            return
        try:
            self._opened(self._drawing).take(self.rank)
        except OSError as error:
            if not are_missing(error):
                raise
            raise CascadeError(
                f"{self._state.parent}: no locks on this file system, which {self.count} processes need to share work;"
                " give each a part with --shard instead, or write to a local disk"
            ) from None

    @property
    def before(self) -> int:
        """The manifest's length in bytes when the first process began."""
        path = self._path("before")
        try:
            return int(path.read_text(encoding="ascii"))
        except ValueError:
            raise CascadeError(f"{path}: was changed during the run; start again") from None

    def claim(self, unit: int) -> bool:
        """Claim a unit of work; returns False if another process draws it or has drawn it."""
        if self.count == 1:
            return True
        claims = self._opened(self._claims)
        if not claims.take(unit):
            return False
        if claims.is_done(unit):  # its failures are recorded, and its pictures need no second check
            claims.release(unit)
            return False
        return True

    def finish(self, unit: int) -> None:
        """Mark a unit as done."""
        if self.count > 1:
            self._opened(self._claims).finish(unit)

    def wait_for_the_others(self) -> None:
        """Wait until no process draws any more: launchers end all processes when one ends with a failure."""
        if self.count == 1:
            return
        drawing = self._opened(self._drawing)
        drawing.release(self.rank)
        for rank in range(self.count):
            if rank != self.rank:
                drawing.wait(rank)

    def are_done(self, units: Iterable[int]) -> bool:
        """Whether all of `units` are finished; a process that was stopped leaves some undone."""
        return self.count == 1 or all(map(self._opened(self._claims).is_done, units))

    def leave(self) -> None:
        """Release the claims; the folder stays locked until `unlock`."""
        for part in (self._claims, self._drawing):
            if part is not None:
                part.close()

    def unlock(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()

    def _path(self, name: str) -> Path:
        return self._state / self._layout.named(name)

    def _opened(self, claims: Claims | None) -> Claims:
        assert claims is not None, "enter() comes first"
        return claims
