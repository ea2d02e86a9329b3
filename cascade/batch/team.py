"""The processes of one launch, or a single one: the right to write into a folder, and the division of the work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cascade.batch.layout import Layout
from cascade.batch.locks import Claims, RunLock, processes
from cascade.errors import CascadeError
from cascade.locks import are_missing


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
