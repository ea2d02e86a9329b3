"""Being asked to stop: Ctrl-C, and the SIGTERM of schedulers or Ctrl-Break of Windows."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cascade.system import STOP_SIGNALS


class Stopped(Exception):  # noqa: N818 - it is no error
    """What lies between two steps was left undone, because someone asked to stop."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and the system's STOP_SIGNALS ask to stop after the step at hand; a second Ctrl-C stops at once.

    Gives a function that says whether one was received.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a signal handler
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGINT, *STOP_SIGNALS)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
