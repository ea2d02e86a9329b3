"""Events from the drawing thread to all watchers, over an event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
