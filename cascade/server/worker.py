"""The drawing thread: it owns the pipeline and the engine, and draws rounds of pictures from the line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from torch import Tensor

from cascade.batch.metadata import Describer
from cascade.batch.plan import Target
from cascade.batch.stores import Finished
from cascade.drawing.engine import BatchSizes, Conduct, Engine, StoppedError, shelf_key
from cascade.drawing.task import Drawn, Pass, Result, Shelf, Step, Task, Undrawn
from cascade.drawing.trace import Recorder, traced
from cascade.errors import CascadeError
from cascade.pictures.images import from_pil
from cascade.pictures.rasters import file_formats, shown
from cascade.pipeline import CascadePipeline
from cascade.server.asked import EnlargedTarget
from cascade.server.gallery import Gallery
from cascade.server.jobs import Event, Hub, Job, Piece, Progress, WaitingLine
from cascade.server.sources import Scene, data_url
from cascade.text.t5 import TextEncoder, words_of

# --- pace ------------------------------------------------------------------------------------------------------------
# Measured duration of steps, and the remaining time of a picture.

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


# --- round -----------------------------------------------------------------------------------------------------------
# One round of the engine: pictures of one or several jobs that share batches, with progress at every step.


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


# --- worker ----------------------------------------------------------------------------------------------------------

logger = logging.getLogger("cascade.server")


@dataclass
class Counts:
    """Counts since the start, for metrics."""

    drawn: int = 0
    failed: int = 0
    stopped: int = 0
    seconds: float = 0.0


class Worker:
    """Draws until it is closed. pipeline: set when the model is loaded."""

    def __init__(self, load: Callable[[], CascadePipeline], line: WaitingLine, gallery: Gallery, hub: Hub) -> None:
        self.pipeline: Future[CascadePipeline] = Future()
        self.counts, self.pace = Counts(), Pace()
        self._load, self._line, self._gallery, self._hub = load, line, gallery, hub
        self._round: Round | None = None
        self._shelf = WatchedShelf(self._put)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="draws", daemon=True)

    def start(self) -> None:
        """Load the model, then draw, both in the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; unfinished pictures keep their place."""
        self._closing = True
        self._line.close()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread can still draw."""
        return self._thread.is_alive()

    def switch(self, load: Callable[[], CascadePipeline]) -> None:
        """Switch to another model; the caller ensures that nothing is waiting or being drawn."""
        self._load, self.pipeline = load, Future()
        self._line.interrupt()

    def _work(self) -> None:
        while not self._closing:
            loading = self.pipeline
            try:
                loading.set_result(_showable(self._load()))
            except Exception as error:  # raised in every request
                logger.error("%s", error)
                loading.set_exception(error)
                if not self._line.wait_for_interrupt():
                    return
                continue
            self._serve(loading.result())

    def _serve(self, pipeline: CascadePipeline) -> None:
        """Draw with one model until the next switch or the end."""
        self.pace = Pace()
        engine = pipeline.engine(Conduct(abort=self._abandoned, on_step=self._step), self._shelf)
        while pieces := self._line.take(pipeline.default_batch_size):
            start = time.perf_counter()
            self._draw(engine, Round(pieces, self._hub, self.pace, pipeline.text_encoder))
            self.counts.seconds += time.perf_counter() - start
            self._round = None

    def _draw(self, engine: Engine, round: Round) -> None:
        self._round = round
        for job in {piece.job: None for piece in round.tasks.values()}:
            self._hub.publish(Event("job", job.to_json(), f"job {job.id}"))
        open = dict(round.tasks)
        try:
            for result in engine.draw(list(round.tasks)):
                recorder = round.recorders.get(result.task)
                self._take(open.pop(result.task), result, recorder)
        except StoppedError:
            for task, piece in open.items():
                self._stopped(piece, round.left_over(task, engine.batch_sizes))
        except CascadeError as error:
            self._fail(list(open.values()), str(error))
        except Exception:
            logger.exception("a picture could not be drawn")
            self._fail(list(open.values()), "an internal error; see the server's log")
        finally:
            self._shelf.clear()

    def _take(self, piece: Piece, result: Result, recorder: Recorder | None) -> None:
        if isinstance(result, Undrawn):
            self._fail([piece], result.reason)
            return
        if recorder is not None:
            piece.job.trace = self._gallery.traces.write(piece.target, recorder, self.pipeline.result())
        else:
            whole = piece.target.fitted(result) if isinstance(piece.target, EnlargedTarget) else result
            self._keep(piece, piece.target, whole)
        self.counts.drawn += 1
        self._settle(piece)

    def _keep(self, piece: Piece, target: Target, drawn: Drawn) -> None:
        """Store a picture in the gallery. Raises CascadeError when it cannot be written."""
        job = piece.job
        describe = Describer(self.pipeline.result(), job.asked.options())
        picture = self._gallery.write(Finished(target, drawn, describe(target, drawn)))
        job.pictures[target.number] = picture
        self._hub.publish(Event("picture", {"job": job.id, "number": target.number, "picture": picture}))

    def _stopped(self, piece: Piece, left_over: tuple[Target, Drawn] | None) -> None:
        """Settle a stopped picture: keep its result if the client stopped it; redraw it later if the server ends."""
        if not piece.job.stopping:
            return
        self.counts.stopped += 1
        if left_over is not None:
            self._keep(piece, *left_over)
        self._settle(piece)

    def _fail(self, pieces: list[Piece], reason: str) -> None:
        for piece in pieces:
            self.counts.failed += 1
            self._settle(piece, reason)

    def _settle(self, piece: Piece, error: str = "") -> None:
        job: Job = piece.job
        job.settle(piece.target.number, error)
        self._hub.publish(Event("job", job.to_json(), f"job {job.id}"))

    def _abandoned(self) -> bool:
        return self._closing or (self._round is not None and self._round.abandoned())

    def _step(self, step: Step) -> None:
        assert self._round is not None, "the engine draws rounds"
        self._round.step(step)

    def _put(self, key: str, pixels: Tensor) -> None:
        assert self._round is not None, "the engine draws rounds"
        self._round.smaller(key, pixels)


def _showable(pipeline: CascadePipeline) -> CascadePipeline:
    """`pipeline`. Raises CascadeError if a browser cannot show its pictures."""
    if "png" not in file_formats(pipeline.pictures):
        raise CascadeError(
            f"model {pipeline.name}: draws {pipeline.pictures}, which the page cannot show; use `cascade generate`"
        )
    return pipeline
