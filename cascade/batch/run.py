"""A run: plans records, draws windows of them, writes pictures in the background, and keeps finished pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeAlias

from cascade.batch.metadata import Describer
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Job, Planner, Target
from cascade.batch.reports import Progress
from cascade.batch.stores import Finished
from cascade.drawing.engine import Engine, StoppedError
from cascade.drawing.task import Result, Shelf, Undrawn
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline
from cascade.prompts.records import Failure, PromptRecord

# --- writer ----------------------------------------------------------------------------------------------------------
# A thread that writes pictures while the network draws.

WAITING = 16
"""Maximum number of pictures in the queue; when it is full the network waits, which bounds the memory."""


class BackgroundWriter:
    """Runs pieces of work in order, in a thread. Leaving the `with` block waits until all are done."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raises the thread's error, unless another error is already being raised."""
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, work: Callable[[], object]) -> None:
        """Queue a piece of work. Raises the error of earlier work."""
        self._raise()
        self._queue.put(work)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:  # after an error the rest is discarded, so that `put` never blocks
                try:
                    work()
                except BaseException as error:  # handed to the thread that draws
                    self._error = error


# --- run -------------------------------------------------------------------------------------------------------------

LOW_MEMORY_WINDOW = 64
"""Prompts drawn per loading of the stages when memory is short."""


@dataclass
class Summary:
    """The result of a run. pictures: drawn by it; kept: finished earlier; stopped: there is more to draw.

    last_unit: number of the last unit of work, this process's or another's; -1: there was none.
    """

    pictures: int = 0
    kept: int = 0
    failures: int = 0
    stopped: bool = False
    last_unit: int = field(default=-1, compare=False)


Line: TypeAlias = PromptRecord | Failure


def run_batch(
    pipeline: CascadePipeline,
    records: Iterable[Line],
    options: DrawOptions,
    output: Output,
    progress: Progress | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Draw and write every record that `output`, after its `begin`, does not hold yet.

    stop: called regularly; True ends the run early. Raises CascadeError if the request itself cannot be satisfied.
    """
    planner, reports = Planner(pipeline, options), progress or Progress()
    conduct = options.conduct(stop=stop, on_step=lambda step: reports.step(step.stage, step.step, step.steps))
    engine = pipeline.engine(conduct, Shelf(output.shelf) if options.low_memory else None)
    window = planner.window(engine.batch_sizes)
    with BackgroundWriter() as writer:
        describe = Describer(pipeline, options, output.layout.finish.described())
        run = _Run(planner, engine, describe, output, writer, reports, options.strict)
        try:
            for unit, lines in _units(records, output, window):
                if stop():
                    raise StoppedError
                run.summary.last_unit = unit
                if output.claim(unit):
                    run.draw_unit(unit, lines, window)
        except StoppedError:
            run.summary.stopped = True
    return run.summary


def _units(records: Iterable[Line], output: Output, window: int) -> Iterator[tuple[int, list[Line]]]:
    """The lines of this shard in units that one process draws: a window, or a tar.

    Units follow from the order of the lines alone, so every process forms the same ones.
    """
    unit, lines = 0, list[Line]()
    for line in records:
        if not output.owns(line.index):
            continue
        tar = output.unit(line.index)
        if lines and tar not in (None, unit):
            yield unit, lines
            lines = []
        unit = unit if tar is None else tar
        lines.append(line)
        if tar is None and len(lines) == window:  # now, because the next line may take long to arrive
            yield unit, lines
            lines = []
            unit += 1
    if lines:
        yield unit, lines


@dataclass
class _Run:
    """State shared by the steps of a run."""

    planner: Planner
    engine: Engine
    describe: Describer
    output: Output
    writer: BackgroundWriter
    progress: Progress
    strict: bool

    def __post_init__(self) -> None:
        self.summary = Summary()

    def draw_unit(self, unit: int, lines: list[Line], window: int) -> None:
        """Draw the missing pictures of a unit, window by window."""
        for start in range(0, len(lines), window):
            jobs = [job for line in lines[start : start + window] if (job := self._planned(line)) is not None]
            targets = [target for job in jobs for target in job.targets() if not self._kept(target)]
            missing = {target.task(): target for target in targets}
            for result in self.engine.draw(list(missing)):
                self._take(missing[result.task], result)
        self.writer.put(lambda: self.output.finish(unit))

    def _planned(self, line: Line) -> Job | None:
        if isinstance(line, Failure):
            self._fail(line)
            return None
        try:
            return self.planner.job(line)
        except CascadeError as error:
            self._fail(Failure(line.origin, str(error), line.index))
            return None

    def _kept(self, target: Target) -> bool:
        kept = self.output.has(target)
        if kept:
            self.summary.kept += 1
            self.progress.kept()
        return kept

    def _take(self, target: Target, result: Result) -> None:
        if isinstance(result, Undrawn):
            record = target.job.record
            self._fail(Failure(record.origin, result.reason, record.index), number=target.number)
            return
        self.summary.pictures += 1
        picture = Finished(target, result, self.describe(target, result))
        self.writer.put(lambda: self.progress.picture(self.output.write(picture)))

    def _fail(self, failure: Failure, **more: Any) -> None:
        if self.strict:
            raise CascadeError(str(failure))
        self.summary.failures += 1
        self.output.fail(failure, **more)
        self.progress.failed(failure)
