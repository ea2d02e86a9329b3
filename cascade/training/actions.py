"""Periodic actions of a training run: log entry, validation, sample grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cascade.checkpoint import atomic_file
from cascade.stage import Stage
from cascade.text.embeddings import TextEncoderProtocol
from cascade.training.accelerator import any_process, from_main
from cascade.training.interrupt import Stopped
from cascade.training.log import Meter, flatten
from cascade.training.samples import SampleGrid
from cascade.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Moment:
    """The state after a completed step.

    averaged: returns the stage with the averaged weights. stopped: whether the run was asked to stop.
    """

    step: int
    averaged: Callable[[], Stage]
    stopped: Callable[[], bool]


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether an action with period `every` is due after a step of a run of `steps`; it also is after the last."""
    return every > 0 and (step % every == 0 or step == steps)


class Action(ABC):
    """An action performed every `every` steps and after the last one; 0: never.

    lengthy: it may take so long that a run that is asked to stop leaves it to the resumed run.
    """

    lengthy = False

    def __init__(self, every: int) -> None:
        self._every = every

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the action is due after a step of a run of `steps`."""
        return is_due(self._every, step, steps)

    @abstractmethod
    def run(self, moment: Moment) -> Mapping[str, float]:
        """Perform the action, in all processes together; returns values for the log entry. Raises Stopped."""


class LogEntry(Action):
    """The means over the steps since the last entry."""

    def __init__(self, every: int, means: Callable[[int], Mapping[str, float]]) -> None:
        """means: returns the means since its last call."""
        super().__init__(every)
        self._means = means

    def run(self, moment: Moment) -> Mapping[str, float]:
        """The means."""
        return self._means(moment.step)


class Validate(Action):
    """The loss on held-out pictures."""

    lengthy = True

    def __init__(self, every: int, validation: Validation, text: TextEncoderProtocol, accelerator: Accelerator) -> None:
        super().__init__(every)
        self.validation, self._text, self._accelerator = validation, text, accelerator

    def run(self, moment: Moment) -> Mapping[str, float]:
        """The mean loss over the pictures of all processes, and by noise level."""

        def leave_if_asked() -> None:
            if any_process(self._accelerator, moment.stopped()):
                raise Stopped

        averaged = moment.averaged()
        with self._accelerator.autocast():
            pairs = self.validation.losses(averaged, self._text, self._accelerator.device, leave_if_asked)
        gathered = self._accelerator.gather(torch.stack(pairs, dim=1))
        meter = Meter()
        meter.add_losses(flatten(gathered[:, 0]), flatten(gathered[:, 1]))
        return {f"validation_{name}": value for name, value in meter.means().items()}


class Grid(Action):
    """A sheet of pictures drawn by the stage, samples/step-N.png."""

    lengthy = True

    def __init__(self, every: int, grid: SampleGrid, folder: Path, accelerator: Accelerator) -> None:
        super().__init__(every)
        self._grid, self._folder, self._accelerator = grid, folder, accelerator

    def run(self, moment: Moment) -> Mapping[str, float]:
        """Draw on the main process. Raises Stopped in every process when asked to stop in the meantime."""
        averaged = moment.averaged()

        def leave_if_asked(*_: object) -> None:
            if moment.stopped():
                raise Stopped

        def draw() -> bool:
            try:
                with self._accelerator.autocast():
                    sheet = self._grid.drawn(averaged, leave_if_asked)
            except Stopped:
                return False
            with atomic_file(self._folder / f"step-{moment.step:08d}.png") as temporary:
                sheet.save(temporary, format="PNG")
            return True

        if not from_main(self._accelerator, draw):
            raise Stopped
        return {}
