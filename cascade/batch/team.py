"""The processes of one launch, or one alone: which may write into a folder, and which draws what."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cascade.batch.layout import Layout
from cascade.batch.locks import Claims, RunLock, processes


class Team:
    """Processes that share a folder. Everything that they hold ends with them, however they end.

    rank: our number among `count`.
    """

    def __init__(self, state: Path, layout: Layout) -> None:
        """state: a folder for locks, of which each shard has its own."""
        self._state, self._layout = state, layout
        self.rank, self.count, self._launch = processes()
        self._lock: RunLock | None = None
        self._claims: Claims | None = None
        self._drawing: Claims | None = None

    def enter(self) -> bool:
        """Take the folder; whether we are the first and have to prepare it, before `let_in`.

        Raises CascadeError when another run has it, OSError when no lock can be written.
        """
        self._lock = RunLock(self._path("lock"), self._launch)
        self._lock.acquire()
        self._claims, self._drawing = Claims(self._path("claims")), Claims(self._path("drawing"))
        return self._lock.first

    def let_in(self, before: int) -> None:
        """The folder is prepared. before: how long the manifest was then."""
        assert self._lock is not None, "enter() comes first"
        self._opened(self._claims).clear()
        self._path("before").write_text(str(before), encoding="ascii")
        self._lock.share()

    def start(self) -> None:
        """From now on the others wait for us."""
        self._opened(self._drawing).take(self.rank)

    @property
    def before(self) -> int:
        """How long the manifest was when the first of us came."""
        return int(self._path("before").read_text(encoding="ascii"))

    def claim(self, unit: int) -> bool:
        """Whether we may draw a unit: nobody draws it, or has. Of several it is whoever comes first."""
        if self.count == 1:
            return True
        claims = self._opened(self._claims)
        if not claims.take(unit):
            return False
        if claims.is_done(unit):  # its failures are written down, and its pictures need no second look
            claims.release(unit)
            return False
        return True

    def finish(self, unit: int) -> None:
        """A unit is done."""
        if self.count > 1:
            self._opened(self._claims).finish(unit)

    def wait_for_the_others(self) -> None:
        """Until none of us draws any more: launchers end all when one ends with a failure."""
        drawing = self._opened(self._drawing)
        drawing.release(self.rank)
        for rank in range(self.count):
            if rank != self.rank:
                drawing.wait(rank)

    def are_done(self, units: Iterable[int]) -> bool:
        """Whether all of `units` are finished; one of us that was told to stop left its own."""
        return self.count == 1 or all(map(self._opened(self._claims).is_done, units))

    def leave(self) -> None:
        """Let go of claims; the folder stays ours until `unlock`."""
        for part in (self._claims, self._drawing):
            if part is not None:
                part.close()

    def unlock(self) -> None:
        """Others may have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _path(self, name: str) -> Path:
        return self._state / self._layout.named(name)

    def _opened(self, claims: Claims | None) -> Claims:
        assert claims is not None, "enter() comes first"
        return claims
