"""News from the thread that draws to everyone who watches, over an event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MOST_PENDING = 1000
"""News that wait for one watcher; who falls further behind is sent the whole state again."""


@dataclass(frozen=True)
class Event:
    """One piece of news. key: a newer one with the same key takes the place of one not yet sent."""

    kind: str
    data: Mapping[str, Any]
    key: str = ""


class Watcher:
    """The news for one tab, in order, on its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[str, Event] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._news = asyncio.Event()
        self.missed = False
        self.closed = False

    def put(self, event: Event) -> None:
        """From any thread."""
        with self._lock:
            if len(self._pending) >= MOST_PENDING:
                self._pending.clear()
                self.missed = True
            self._pending[event.key or f"#{next(self._numbers)}"] = event
        self._wake()

    def close(self) -> None:
        """Nothing more comes. From any thread."""
        self.closed = True
        self._wake()

    async def next(self, seconds: float) -> list[Event]:
        """What came since, at the latest after `seconds`, then perhaps nothing."""
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
    """Everyone who watches."""

    _watchers: set[Watcher] = field(default_factory=set)
    _closed: bool = False

    @property
    def watched(self) -> bool:
        """Whether anybody does: previews for nobody are not made."""
        return bool(self._watchers)

    def publish(self, event: Event) -> None:
        """Let everyone know. From any thread."""
        for watcher in tuple(self._watchers):
            watcher.put(event)

    @contextmanager
    def watching(self) -> Iterator[Watcher]:
        """A watcher for a while; on an event loop."""
        watcher = Watcher(asyncio.get_running_loop())
        watcher.closed = self._closed
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Send everyone home."""
        self._closed = True
        for watcher in tuple(self._watchers):
            watcher.close()
