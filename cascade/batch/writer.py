"""A thread that writes while the network draws."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

WAITING = 16
"""Pictures that may wait to be written; then the network waits, and memory stays what it is."""


class BackgroundWriter:
    """Does one piece of work after another, in the order given. Leaving the `with` waits until all is done."""

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
        """Raises what went wrong in the thread, unless something else already does."""
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, work: Callable[[], object]) -> None:
        """Have it done soon. Raises what went wrong with earlier work."""
        self._raise()
        self._queue.put(work)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:  # after an error the rest is thrown away, so that nobody waits for the queue
                try:
                    work()
                except BaseException as error:  # handed to the thread that draws
                    self._error = error
