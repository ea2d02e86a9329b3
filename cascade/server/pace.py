"""Measured duration of steps, and the remaining time of a picture."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.drawing.task import Pass

_FIRST_SECONDS_A_PIXEL = 1e-6
_WEIGHT = 0.3  # of the newest step, since the load of other programs changes


class Pace:
    """Seconds per step, for each stage at each size."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, tuple[int, int]], float] = {}

    def learn(self, drawing: Pass, seconds: float) -> None:
        """Record the duration of a step."""
        key = (drawing.slot.config.name, drawing.size)
        known = self._seconds.get(key, seconds)
        self._seconds[key] = known + _WEIGHT * (seconds - known)

    def of(self, drawing: Pass) -> float:
        """Seconds for one step; an estimate if none was measured."""
        key = (drawing.slot.config.name, drawing.size)
        height, width = drawing.size
        return self._seconds.get(key, _FIRST_SECONDS_A_PIXEL * height * width)

    def knows(self, passes: Sequence[Pass]) -> bool:
        """Whether a step of each pass was measured."""
        return all((drawing.slot.config.name, drawing.size) in self._seconds for drawing in passes)

    def seconds(self, passes: Sequence[Pass]) -> float:
        """Seconds for a whole picture."""
        return sum(self.of(drawing) * steps_of(drawing) for drawing in passes)


def steps_of(drawing: Pass) -> int:
    """The approximate number of sampling steps; the length of a named list is not resolved here."""
    settings = drawing.settings
    return len(settings.timesteps) if isinstance(settings.timesteps, tuple) else settings.steps
