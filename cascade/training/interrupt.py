"""Requests to stop: Ctrl-C, SIGTERM from schedulers, Ctrl-Break on Windows."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cascade.system import STOP_SIGNALS


class Stopped(Exception):  # noqa: N818 - it is no error
    """An action between two steps was abandoned because the run was asked to stop."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Context in which Ctrl-C and STOP_SIGNALS request a stop after the current step; a second Ctrl-C stops at once.

    Yields a function that returns whether a request was received.
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
