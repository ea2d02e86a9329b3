"""A job: one prompt that somebody asked for, its pictures, and how far they are."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cascade.batch.plan import Job as Plan
from cascade.batch.plan import Target
from cascade.server.asked import Asked


class State(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    DRAWING = "drawing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """How far a picture is. fraction: of its time. seconds_left: None while nothing is known of the pace."""

    stage: str
    step: int
    steps: int
    fraction: float
    seconds_left: float | None
    preview: str = ""

    def to_json(self) -> dict[str, Any]:
        """preview: a data URL, empty where there is none."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {**vars(self), "fraction": round(self.fraction, 4), "seconds_left": left}


@dataclass(eq=False)
class Job:
    """What was asked for and what became of it. client: who asked, so that all get their turn.

    pictures: of the gallery, by number. trace: its name, where one was requested and is done. result: set once nothing
    more comes of the job.
    """

    asked: Asked
    plan: Plan
    client: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.WAITING
    asked_at: float = field(default_factory=time.time)
    pictures: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)
    error: str = ""
    trace: str = ""
    missing: set[int] = field(default_factory=set)
    stopping: bool = False
    result: Future[Job] = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    size: tuple[int, int] = field(init=False)
    """Height and width of its pictures."""
    held_bytes: int = field(init=False)
    """Memory of the picture that it changes or enlarges."""

    def __post_init__(self) -> None:
        self.missing = set(self.asked.numbers)
        task = next(self.plan.targets()).task()
        edit = task.edit
        self.size = task.recipe.height, task.recipe.width
        if edit is not None and edit.mask is not None:  # the part that is drawn is put back into the whole picture
            self.size = edit.image.shape[-2], edit.image.shape[-1]
        given = [task.start, *([] if edit is None else [edit.image, edit.mask])]
        self.held_bytes = sum(pixels.nbytes for pixels in given if pixels is not None)

    @property
    def over(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in (State.DONE, State.STOPPED, State.FAILED)

    def targets(self) -> list[Target]:
        """The pictures that are to be drawn."""
        return [target for target in self.plan.targets() if target.number in self.missing]

    def settle(self, number: int, error: str = "") -> None:
        """A picture is drawn, or will not be; the last one ends the job. From any thread."""
        with self._lock:
            self.missing.discard(number)
            self.progress.pop(number, None)
            self.error = self.error or error
            if self.missing or self.over:
                return
            self.state = State.FAILED if self.error else State.STOPPED if self.stopping else State.DONE
            plan = self.plan  # without the picture that it changes: jobs that are over are remembered for a while
            self.plan = Plan(plan.record, plan.negative_prompt, plan.num_images, plan.slots, plan.sizes, plan.settings)
        self.result.set_result(self)

    def to_json(self) -> dict[str, Any]:
        """For those who watch."""
        return {
            "id": self.id,
            "state": self.state.value,
            "asked": self.asked.to_json(),
            "asked_at": self.asked_at,
            "size": dict(zip(("height", "width"), self.size, strict=True)),
            "numbers": list(self.asked.numbers),
            "pictures": {str(number): picture for number, picture in sorted(self.pictures.items())},
            "progress": {str(number): progress.to_json() for number, progress in sorted(self.progress.items())},
            "stopping": self.stopping,
            "error": self.error,
            "trace": self.trace,
        }
