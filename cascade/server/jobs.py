"""A job (one requested prompt, its pictures, their progress), its events, and the line in which pictures wait."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cascade.batch.plan import Job as Plan
from cascade.batch.plan import Target
from cascade.errors import CascadeError
from cascade.server.asked import Asked

# --- events ----------------------------------------------------------------------------------------------------------
# Events from the drawing thread to all watchers, over an event loop.

MOST_PENDING = 1000
"""Events that may wait for one watcher; one further behind is sent the whole state again."""


@dataclass(frozen=True)
class Event:
    """One event. key: a newer event replaces an unsent one with the same key."""

    kind: str
    data: Mapping[str, Any]
    key: str = ""


class Watcher:
    """The queue of events for one tab, on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[str, Event] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._news = asyncio.Event()
        self.missed = False
        self.closed = False

    def put(self, event: Event) -> None:
        """Add an event. From any thread."""
        with self._lock:
            if len(self._pending) >= MOST_PENDING:
                self._pending.clear()
                self.missed = True
            self._pending[event.key or f"#{next(self._numbers)}"] = event
        self._wake()

    def close(self) -> None:
        """End the queue. From any thread."""
        self.closed = True
        self._wake()

    async def next(self, seconds: float) -> list[Event]:
        """The events since the last call; waits up to `seconds` for one, then returns an empty list."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return []
        self._news.clear()
        with self._lock:
            events, self._pending = list(self._pending.values()), {}
        return events

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)


@dataclass
class Hub:
    """All watchers."""

    _watchers: set[Watcher] = field(default_factory=set)
    _closed: bool = False

    @property
    def watched(self) -> bool:
        """Whether there are watchers; without any, no previews are made."""
        return bool(self._watchers)

    def publish(self, event: Event) -> None:
        """Send an event to all watchers. From any thread."""
        for watcher in tuple(self._watchers):
            watcher.put(event)

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """Context with a new watcher on the running event loop."""
        watcher = Watcher(asyncio.get_running_loop())
        watcher.closed = self._closed
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Close all watchers."""
        self._closed = True
        for watcher in tuple(self._watchers):
            watcher.close()


# --- jobs ------------------------------------------------------------------------------------------------------------
# A job: one requested prompt, its pictures, and their progress.


class State(StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    DRAWING = "drawing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """Progress of a picture. fraction: of its time. seconds_left: None while the speed is unknown."""

    stage: str
    step: int
    steps: int
    fraction: float
    seconds_left: float | None
    preview: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON for the page. preview: a data URL, or empty."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {**vars(self), "fraction": round(self.fraction, 4), "seconds_left": left}


@dataclass(eq=False)
class Job:
    """A request and its results. client: for fair scheduling.

    pictures: gallery entries by number. trace: its name, if requested and finished. result: set when the job is over.
    """

    asked: Asked
    plan: Plan
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.WAITING
    asked_at: float = field(default_factory=time.time)
    pictures: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)
    error: str = ""
    trace: str = ""
    missing: set[int] = field(default_factory=set)
    stopping: bool = False
    result: Future[Job] = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    size: tuple[int, int] = field(init=False)
    """Height and width of the pictures."""
    held_bytes: int = field(init=False)
    """Memory of the picture that the job edits or enlarges."""

    def __post_init__(self) -> None:
        self.missing = set(self.asked.numbers)
        task = next(self.plan.targets()).task()
        edit = task.edit
        self.size = task.recipe.height, task.recipe.width
        if edit is not None and edit.mask is not None:  # the redrawn part is put back into the whole picture
            self.size = edit.image.shape[-2], edit.image.shape[-1]
        given = [task.start, *([] if edit is None else [edit.image, edit.mask])]
        self.held_bytes = sum(pixels.nbytes for pixels in given if pixels is not None)

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.state in (State.DONE, State.STOPPED, State.FAILED)

    def targets(self) -> list[Target]:
        """The pictures to draw."""
        return [target for target in self.plan.targets() if target.number in self.missing]

    def settle(self, number: int, error: str = "") -> None:
        """Record that a picture is drawn or has failed; the last one ends the job. From any thread."""
        with self._lock:
            self.missing.discard(number)
            self.progress.pop(number, None)
            self.error = self.error or error
            if self.missing or self.over:
                return
            self.state = State.FAILED if self.error else State.STOPPED if self.stopping else State.DONE
            plan = self.plan  # without the edited picture, since finished jobs are kept for a while
            self.plan = Plan(plan.record, plan.negative_prompt, plan.num_images, plan.slots, plan.sizes, plan.settings)
        self.result.set_result(self)

    def to_json(self) -> dict[str, Any]:
        """JSON for watchers."""
        return {
            "id": self.id,
            "state": self.state.value,
            "asked": self.asked.to_json(),
            "asked_at": self.asked_at,
            "size": dict(zip(("height", "width"), self.size, strict=True)),
            "numbers": list(self.asked.numbers),
            "pictures": {str(number): picture for number, picture in sorted(self.pictures.items())},
            "progress": {str(number): progress.to_json() for number, progress in sorted(self.progress.items())},
            "stopping": self.stopping,
            "error": self.error,
            "trace": self.trace,
        }


# --- waiting ---------------------------------------------------------------------------------------------------------
# The line of waiting pictures, in drawing order: clients take turns.

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
        stages = tuple(map(id, plan.slots))  # adapters make other stages, whose weights are loaded for a batch
        return (
            stages,
            tuple(plan.sizes),
            tuple(plan.settings[slot.config.name].model_dump_json() for slot in plan.slots),
        )


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
