"""One round of the engine: pictures of one or several jobs that share batches, with progress at every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from cascade.batch.plan import Target
from cascade.drawing.batch_size import BatchSizes
from cascade.drawing.engine import shelf_key
from cascade.drawing.shelf import Shelf
from cascade.drawing.task import Drawn, Step, Task
from cascade.drawing.trace import Recorder, traced
from cascade.images import from_pil
from cascade.rasters import shown
from cascade.server.events import Event, Hub
from cascade.server.jobs import Progress
from cascade.server.pace import Pace, steps_of
from cascade.server.previews import Scene, data_url
from cascade.server.waiting import Piece
from cascade.text.t5 import TextEncoder
from cascade.text.words import words_of


class WatchedShelf(Shelf):
    """A shelf that reports each finished smaller picture."""

    def __init__(self, on_put: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._on_put = on_put

    def put(self, key: str, pixels: Tensor) -> None:
        """See `Shelf.put`; then call `on_put`."""
        super().put(key, pixels)
        self._on_put(key, pixels)

    def clear(self) -> None:
        """Remove everything, because after a stop nothing is fetched."""
        for key in tuple(self._held):
            self.drop(key)


class Round:
    """The pieces that the engine is drawing, and their events."""

    def __init__(self, pieces: Sequence[Piece], hub: Hub, pace: Pace, encoder: TextEncoder) -> None:
        """encoder: for the words of a traced prompt."""
        self.tasks, self.recorders = dict[Task, Piece](), dict[Task, Recorder]()
        for piece in pieces:
            task = piece.target.task()
            if piece.job.asked.trace:
                recorder = Recorder(words_of(encoder, task.recipe.prompt))
                task = traced(task, recorder)
                self.recorders[task] = recorder
            self.tasks[task] = piece
        self._hub, self._pace = hub, pace
        self._places = {
            shelf_key(task, position): (task, position)
            for task in self.tasks
            for position in range(len(task.passes) - 1)
        }
        self._smaller: dict[Task, tuple[int, Tensor]] = {}
        self._fractions: dict[Task, float] = {}
        self._positions: dict[Task, int] = {}
        self._scenes = {task: Scene(task.edit) for task in self.tasks if task.edit is not None and hub.watched}
        self._before = time.perf_counter()

    def abandoned(self) -> bool:
        """Whether all jobs of the round were stopped."""
        return all(piece.job.stopping for piece in self.tasks.values())

    def step(self, step: Step) -> None:
        """Report a finished step, with a preview."""
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        for row, task in enumerate(step.tasks):
            if task in self.recorders:
                self.recorders[task].step(step)
            if step.step == 0:
                self._positions[task] = self._positions.get(task, -1) + 1
            position = self._positions[task]
            if row == 0:
                self._pace.learn(task.passes[position], seconds)
            preview = self._preview(task, step.x_hat[row])
            self._say(task, self._progress(task, position, step.step, step.steps, preview))

    def smaller(self, key: str, pixels: Tensor) -> None:
        """Report a picture that has finished a stage other than its last."""
        task, position = self._places[key]
        self._smaller[task] = (position, pixels)
        steps = steps_of(task.passes[position])
        preview = self._preview(task, pixels, stored=True)
        self._say(task, self._progress(task, position, steps - 1, steps, preview))

    def left_over(self, task: Task, sizes: BatchSizes) -> tuple[Target, Drawn] | None:
        """The result of a stopped picture: that of the last stage that it finished, or None."""
        partial = (
            task.start is not None or task in self.recorders or (task.edit is not None and task.edit.mask is not None)
        )
        if task not in self._smaller or partial:  # with a mask, only the redrawn part
            return None
        position, pixels = self._smaller[task]
        plan, count = self.tasks[task].target.job, position + 1
        smaller = Target(replace(plan, slots=plan.slots[:count], sizes=plan.sizes[:count]), task.recipe.number)
        drawn = smaller.task()
        used = {own.slot.config.name: sizes.of(own) for own in drawn.passes}
        return smaller, Drawn(drawn, [pixels], self._pace.seconds(drawn.passes), used)

    def _preview(self, task: Task, picture: Tensor, stored: bool = False) -> str:
        """A preview of a picture (C, H, W), x_hat or stored, with a mask in its surroundings; "" without watchers."""
        if not self._hub.watched:
            return ""
        form = task.passes[0].slot.config.pictures
        if not form.is_rgb:
            return data_url(from_pil(shown(picture if stored else form.from_float(picture), form)))
        scene = self._scenes.get(task)
        return data_url(picture if scene is None else scene.with_part(picture))

    def _progress(self, task: Task, position: int, step: int, steps: int, preview: str) -> Progress:
        stage, total = task.passes[position], self._pace.seconds(task.passes)
        done = self._pace.seconds(task.passes[:position]) + self._pace.of(stage) * (step + 1)
        # The estimate of the speed changes, but the bar must not move backwards.
        fraction = self._fractions[task] = max(self._fractions.get(task, 0.0), min(1.0, done / total))
        left = max(0.0, total - done) if self._pace.knows(task.passes) else None
        return Progress(stage.slot.config.name, step, steps, fraction, left, preview)

    def _say(self, task: Task, progress: Progress) -> None:
        job, number = self.tasks[task].job, task.recipe.number
        job.progress[number] = progress
        self._hub.publish(
            Event("step", {"job": job.id, "number": number, **progress.to_json()}, f"step {job.id} {number}")
        )
