"""The line of waiting pictures, in drawing order: clients take turns."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from cascade.batch.plan import Target
from cascade.errors import CascadeError
from cascade.server.jobs import Job, State

MOST_HELD = 1 << 30
"""Bytes of pictures to edit that may wait in memory: 150 of 1024 x 1024 with masks."""


class FullError(CascadeError):
    """Too many pictures are waiting to accept another job."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One picture of a job."""

    job: Job
    target: Target

    @property
    def agreement(self) -> object:
        """A key that is equal for pictures that can share a batch at each stage."""
        plan = self.job.plan
        if self.job.asked.trace:
            return self.job.id
        return tuple(plan.sizes), tuple(plan.settings[slot.config.name].model_dump_json() for slot in plan.slots)


class WaitingLine:
    """Pieces of many clients; the client served last comes last. Several threads put, one takes."""

    def __init__(self, most: int, linger_seconds: float = 0.005) -> None:
        """most: pieces that may wait. linger_seconds: time for others to join a batch that is not full."""
        self._most, self._linger = most, linger_seconds
        self._clients: dict[str, deque[Piece]] = {}
        self._changed = threading.Condition()
        self._closed = self._interrupted = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._clients.values()))

    def put(self, job: Job) -> None:
        """Add the unfinished pictures of a job. Raises FullError."""
        pieces = [Piece(job, target) for target in job.targets()]
        with self._changed:
            if len(self) + len(pieces) > self._most:
                raise FullError(f"{len(self)} pictures are waiting, of at most {self._most}; try again later")
            jobs = {piece.job for waiting in self._clients.values() for piece in waiting}
            if job.held_bytes and job.held_bytes + sum(other.held_bytes for other in jobs) > MOST_HELD:
                raise FullError("the waiting pictures to edit fill the memory reserved for them; try again later")
            self._clients.setdefault(job.client, deque()).extend(pieces)
            self._changed.notify()

    def drop(self, job: Job) -> list[Piece]:
        """Remove and return the waiting pictures of a job."""
        with self._changed:
            pieces = self._clients.get(job.client, deque())
            dropped = [piece for piece in pieces if piece.job is job]
            self._keep(job.client, deque(piece for piece in pieces if piece.job is not job))
            return dropped

    def take(self, most: int) -> list[Piece]:
        """Up to `most` pieces of one agreement; waits until there is one. Empty when closed or interrupted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._interrupted or any(self._clients.values()))
            if self._interrupted:
                self._interrupted = False
                return []
        if most > 1 and len(self) < most:
            time.sleep(self._linger)  # lets simultaneous requests join
        with self._changed:
            if self._closed:
                return []
            batch: list[Piece] = []
            for piece in self._in_turn():
                if len(batch) < most and (not batch or piece.agreement == batch[0].agreement):
                    batch.append(piece)
            for piece in batch:
                self._serve(piece)
            return batch

    def interrupt(self) -> None:
        """Make `take` return once without pieces."""
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    def wait_for_interrupt(self) -> bool:
        """Wait for `interrupt`; False once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._interrupted)
            self._interrupted = False
            return not self._closed

    def close(self) -> None:
        """End the line: `take` returns nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _in_turn(self) -> Iterator[Piece]:
        """The first of each client, then the second of each, and so on."""
        for place in range(max(map(len, self._clients.values()), default=0)):
            for pieces in self._clients.values():
                if place < len(pieces):
                    yield pieces[place]

    def _serve(self, piece: Piece) -> None:
        client = piece.job.client
        pieces = self._clients.pop(client)
        pieces.remove(piece)
        piece.job.state = State.DRAWING
        self._keep(client, pieces)

    def _keep(self, client: str, pieces: deque[Piece]) -> None:
        """Put back the remaining pieces of a client, in its place, or at the end if it has none."""
        if pieces:
            self._clients[client] = pieces
        else:
            self._clients.pop(client, None)
