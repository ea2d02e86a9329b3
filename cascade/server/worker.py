"""The drawing thread: it owns the pipeline and the engine, and takes pictures from the line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from cascade.batch.metadata import Describer
from cascade.batch.pictures import Finished
from cascade.batch.plan import Target
from cascade.drawing.engine import Conduct, Engine, StoppedError
from cascade.drawing.task import Drawn, Result, Step, Undrawn
from cascade.drawing.trace import Recorder
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline
from cascade.rasters import file_formats
from cascade.server.enlarged import EnlargedTarget
from cascade.server.events import Event, Hub
from cascade.server.gallery import Gallery
from cascade.server.jobs import Job
from cascade.server.pace import Pace
from cascade.server.round import Round, WatchedShelf
from cascade.server.waiting import Piece, WaitingLine

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
