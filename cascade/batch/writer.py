"""A thread that writes pictures while the network draws."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

WAITING = 16
"""Maximum number of pictures in the queue; when it is full the network waits, which bounds the memory."""


class BackgroundWriter:
    """Runs pieces of work in order, in a thread. Leaving the `with` block waits until all are done."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises the thread's error, unless another error is already being raised."""
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, work: Callable[[], object]) -> None:
        """Queue a piece of work. Raises the error of earlier work."""
        self._raise()
        self._queue.put(work)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:  # after an error the rest is discarded, so that `put` never blocks
                try:
                    work()
                except BaseException as error:  # handed to the thread that draws
                    self._error = error
