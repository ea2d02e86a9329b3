"""A run: records are planned, windows of them drawn, pictures written in the background; whatever is there is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cascade.batch.engine import Drawn, Engine, Shelf, StoppedError, Undrawn
from cascade.batch.metadata import describe
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Job, Task, plan
from cascade.batch.progress import Progress
from cascade.batch.writer import BackgroundWriter
from cascade.errors import CascadeError
from cascade.pipeline import CascadePipeline
from cascade.prompts import Failure, PromptRecord
from cascade.sampling import resolve_sampling

LOW_MEMORY_WINDOW = 64
"""Prompts that share one loading of the stages when memory is short."""


@dataclass
class Summary:
    """How a run went. pictures: drawn by it; kept: finished earlier; stopped: there is more to draw.

    last_unit: of the pieces of work, its own and other processes', the last; -1: there was none.
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
    strict: bool = False,
    low_memory: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Draw and write every record that `output`, which has begun, does not hold yet.

    strict: the first failure ends the run. low_memory: smaller pictures wait on the disk. stop: asked now and then.
    Raises CascadeError for what the call itself asks for, when that is not possible.
    """
    # What the call itself asks for is checked first: if that is wrong, no line of the file is to blame.
    resolve_sampling([slot.config for slot in pipeline.slots], options.preset, options.sampling)
    progress = progress or Progress()
    shelf = Shelf(output.shelf) if low_memory else None
    engine = Engine(pipeline, options, shelf=shelf, stop=stop, on_step=progress.step)
    with BackgroundWriter() as writer:
        run = _Run(engine, output, writer, progress, strict)
        try:
            for unit, lines in _units(records, output, engine.window):
                if stop():
                    raise StoppedError
                run.summary.last_unit = unit
                if output.claim(unit):
                    run.draw_unit(unit, lines, engine.window)
        except StoppedError:
            run.summary.stopped = True
    return run.summary


def _units(records: Iterable[Line], output: Output, window: int) -> Iterator[tuple[int, list[Line]]]:
    """The lines of this shard in pieces that one process draws: a window, or a tar.

    By their order alone, so that every process cuts the same pieces.
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
        if tar is None and len(lines) == window:  # at once: the next line may take long to come
            yield unit, lines
            lines = []
            unit += 1
    if lines:
        yield unit, lines


@dataclass
class _Run:
    """What the steps of a run share."""

    engine: Engine
    output: Output
    writer: BackgroundWriter
    progress: Progress
    strict: bool

    def __post_init__(self) -> None:
        self.summary = Summary()

    def draw_unit(self, unit: int, lines: list[Line], window: int) -> None:
        """Draw what is missing of a unit, window by window."""
        for start in range(0, len(lines), window):
            jobs = [job for line in lines[start : start + window] if (job := self._planned(line)) is not None]
            missing = [task for job in jobs for task in job.tasks() if not self._kept(task)]
            if missing:
                for result in self.engine.draw(missing):
                    self._take(result)
        self.writer.put(lambda: self.output.finish(unit))

    def _planned(self, line: Line) -> Job | None:
        if isinstance(line, Failure):
            self._fail(line)
            return None
        try:
            return plan(self.engine.pipeline, line, self.engine.options)
        except CascadeError as error:
            self._fail(Failure(line.origin, str(error), line.index))
            return None

    def _kept(self, task: Task) -> bool:
        kept = self.output.has(task.job.record.index, task.number, self.made_by(task))
        if kept:
            self.summary.kept += 1
            self.progress.kept()
        return kept

    def made_by(self, task: Task) -> dict[str, Any]:
        """What a line of the manifest would say of how a picture is made."""
        height, width = self.engine.sizes[-1]
        job = task.job
        return {
            "prompt": job.record.prompt,
            "negative_prompt": job.negative_prompt,
            "seed": job.record.seed,
            "num_images": job.num_images,
            "settings": {
                "height": height,
                "width": width,
                "stages": {
                    slot.config.name: job.settings[slot.config.name].model_dump(mode="json")
                    for slot in self.engine.slots
                },
            },
        }

    def _take(self, result: Drawn | Undrawn) -> None:
        if isinstance(result, Undrawn):
            record = result.task.job.record
            self._fail(Failure(record.origin, result.reason, record.index), number=result.task.number)
            return
        self.summary.pictures += 1
        entry = describe(self.engine.pipeline, result, self.engine.options)
        self.writer.put(lambda: self.progress.picture(self.output.write(result, entry)))

    def _fail(self, failure: Failure, **more: Any) -> None:
        if self.strict:
            raise CascadeError(str(failure))
        self.summary.failures += 1
        self.output.fail(failure, **more)
        self.progress.failed(failure)
