"""A job: one requested prompt, its pictures, and their progress."""

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
    """The state of a job."""

    WAITING = "waiting"
    DRAWING = "drawing"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """Progress of a picture. fraction: of its time. seconds_left: None while the speed is unknown."""

    stage: str
    step: int
    steps: int
    fraction: float
    seconds_left: float | None
    preview: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON for the page. preview: a data URL, or empty."""
        left = None if self.seconds_left is None else round(self.seconds_left, 1)
        return {**vars(self), "fraction": round(self.fraction, 4), "seconds_left": left}


@dataclass(eq=False)
class Job:
    """A request and its results. client: for fair scheduling.

    pictures: gallery entries by number. trace: its name, if requested and finished. result: set when the job is over.
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
    """Height and width of the pictures."""
    held_bytes: int = field(init=False)
    """Memory of the picture that the job edits or enlarges."""

    def __post_init__(self) -> None:
        self.missing = set(self.asked.numbers)
        task = next(self.plan.targets()).task()
        edit = task.edit
        self.size = task.recipe.height, task.recipe.width
        if edit is not None and edit.mask is not None:  # the redrawn part is put back into the whole picture
            self.size = edit.image.shape[-2], edit.image.shape[-1]
        given = [task.start, *([] if edit is None else [edit.image, edit.mask])]
        self.held_bytes = sum(pixels.nbytes for pixels in given if pixels is not None)

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.state in (State.DONE, State.STOPPED, State.FAILED)

    def targets(self) -> list[Target]:
        """The pictures to draw."""
        return [target for target in self.plan.targets() if target.number in self.missing]

    def settle(self, number: int, error: str = "") -> None:
        """Record that a picture is drawn or has failed; the last one ends the job. From any thread."""
        with self._lock:
            self.missing.discard(number)
            self.progress.pop(number, None)
            self.error = self.error or error
            if self.missing or self.over:
                return
            self.state = State.FAILED if self.error else State.STOPPED if self.stopping else State.DONE
            plan = self.plan  # without the edited picture, since finished jobs are kept for a while
            self.plan = Plan(plan.record, plan.negative_prompt, plan.num_images, plan.slots, plan.sizes, plan.settings)
        self.result.set_result(self)

    def to_json(self) -> dict[str, Any]:
        """JSON for watchers."""
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
