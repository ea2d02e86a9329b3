"""Lines on a run's progress where no bar is drawn: output to a file, or the log of a cluster's job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

SECONDS_BETWEEN = 20.0


class Spoken:
    """Turns entries of a run's log into lines, at most one every `SECONDS_BETWEEN`; the first and the last always."""

    def __init__(self, name: str, first: int, last: int, clock: Callable[[], float] = time.monotonic) -> None:
        """name: of the stage. first: the step that the run goes on after. last: of the run. clock: seconds."""
        self._name, self._first, self._last, self._clock = name, first, last, clock
        self._start = clock()
        self._spoken: float | None = None

    def line(self, step: int, values: Mapping[str, float]) -> str | None:
        """The line for an entry of the log, or None if the previous line is recent."""
        now = self._clock()
        if self._spoken is not None and step < self._last and now - self._spoken < SECONDS_BETWEEN:
            return None
        self._spoken = now
        parts = [f"{self._name}: step {step} of {self._last}", f"loss {values['loss']:.4f}"]
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} pictures/s")
        if step < self._last and step > self._first:
            parts.append(f"{duration((now - self._start) / (step - self._first) * (self._last - step))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time as people write it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
