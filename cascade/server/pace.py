"""How long steps take here, learnt while drawing: what is left of a picture."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.drawing.task import Pass

_FIRST_SECONDS_A_PIXEL = 1e-6
_WEIGHT = 0.3  # of the newest step: other programs come and go


class Pace:
    """Seconds a step, for each stage at each size."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, tuple[int, int]], float] = {}

    def learn(self, drawing: Pass, seconds: float) -> None:
        """A step took so long."""
        key = (drawing.slot.config.name, drawing.size)
        known = self._seconds.get(key, seconds)
        self._seconds[key] = known + _WEIGHT * (seconds - known)

    def of(self, drawing: Pass) -> float:
        """Seconds for one step; a guess where none was seen."""
        key = (drawing.slot.config.name, drawing.size)
        height, width = drawing.size
        return self._seconds.get(key, _FIRST_SECONDS_A_PIXEL * height * width)

    def knows(self, passes: Sequence[Pass]) -> bool:
        """Whether a step of each was seen."""
        return all((drawing.slot.config.name, drawing.size) in self._seconds for drawing in passes)

    def seconds(self, passes: Sequence[Pass]) -> float:
        """Of a whole picture."""
        return sum(self.of(drawing) * steps_of(drawing) for drawing in passes)


def steps_of(drawing: Pass) -> int:
    """Sampling steps, about: what a stage makes of a named list is its own affair."""
    settings = drawing.settings
    return len(settings.timesteps) if isinstance(settings.timesteps, tuple) else settings.steps
