"""The shared queue: jobs are drawn one after another, can be stopped, and survive a restart."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError
from cascade.files.text import read_json_file
from cascade.pipeline import CascadePipeline
from cascade.server.asked import Asked
from cascade.server.gallery import Gallery
from cascade.server.jobs import Event, Hub, Job, WaitingLine
from cascade.server.models import Adapters
from cascade.server.worker import Worker
from cascade.settings import parse

logger = logging.getLogger("cascade.server")
MOST_WAITING = 500
"""Default for the number of pictures that may wait."""
_REMEMBERED = 100  # finished jobs that are still listed


class BusyError(CascadeError):
    """A request that is refused while pictures are waiting or being drawn."""


class Queue:
    """Jobs of all clients. `load` loads the pipeline in the drawing thread, so that the page is available earlier."""

    def __init__(
        self,
        load: Callable[[], CascadePipeline],
        gallery: Gallery,
        *,
        most_waiting: int = MOST_WAITING,
        adapters: Callable[[CascadePipeline], Adapters | None] = lambda _: None,
    ) -> None:
        """adapters: those that requests may add to a model."""
        self._adapters = adapters
        self.hub, self.gallery = Hub(), gallery
        self.line = WaitingLine(most_waiting)
        self.sources = gallery.sources()
        self.worker = Worker(load, self.line, gallery, self.hub)
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._kept = gallery.state / "queue.json"

    def start(self) -> None:
        """Start; unfinished jobs of an earlier process resume as soon as the model is loaded."""
        self.worker.pipeline.add_done_callback(self._loaded)
        self.worker.start()

    def close(self) -> None:
        """Stop after the current step, and save unfinished jobs."""
        self.worker.close()
        self.hub.close()
        left = [{"asked": job.asked.to_json(), "missing": sorted(job.missing)} for job in self.jobs() if not job.over]
        if left:
            self._kept.write_text(json.dumps(left), encoding="utf-8")

    @property
    def pipeline(self) -> CascadePipeline:
        """The model; waits while it is loading. Raises the error if loading failed."""
        return self.worker.pipeline.result()

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that requests may add to the model; None: the server offers none."""
        return self._adapters(self.pipeline)

    def submit(self, asked: Asked, client: str, loaded: Future[CascadePipeline] | None = None) -> Job:
        """Add a job. loaded: the model to draw with; BusyError if it is no longer the current one.

        Raises CascadeError if the job cannot be drawn, FullError when too much waits.
        """
        return self._enter(asked.settled(), client, loaded=loaded)

    def submit_all(self, several: Sequence[Asked], client: str) -> list[Job]:
        """Add jobs, all or none. Raises CascadeError for one that cannot be drawn, FullError when too much waits."""
        jobs = list[Job]()
        try:
            for asked in several:
                jobs.append(self.submit(asked, client))
        except CascadeError:
            for job in jobs:
                self.stop(job)
            raise
        return jobs

    def stop(self, job: Job) -> None:
        """Stop a job; its unfinished pictures are kept."""
        job.stopping = not job.over
        for piece in self.line.drop(job):
            job.settle(piece.target.number)
        self.hub.publish(Event("job", job.to_json(), f"job {job.id}"))

    def switch(self, load: Callable[[], CascadePipeline]) -> None:
        """Switch to another model. Raises BusyError while jobs are waiting or being drawn."""
        with self._lock:
            if not self.worker.pipeline.done() or any(not job.over for job in self._jobs.values()):
                raise BusyError("pictures wait or are drawn; choose another model when they are done")
            self.worker.switch(load)
            self.worker.pipeline.add_done_callback(self._publish_loaded)
        self.hub.publish(Event("state", {"ready": False, "error": "", "jobs": [job.to_json() for job in self.jobs()]}))

    def job(self, id: str) -> Job:
        """A job by its id. Raises KeyError."""
        with self._lock:
            return self._jobs[id]

    def jobs(self) -> list[Job]:
        """Current jobs and some finished ones, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def seconds_left(self) -> float:
        """Estimated seconds until all waiting pictures are drawn."""
        open = [(job, len(job.missing)) for job in self.jobs() if not job.over]
        pace = self.worker.pace
        return sum(count * pace.seconds(job.targets()[0].task().passes) for job, count in open if count)

    def _enter(
        self,
        asked: Asked,
        client: str,
        missing: set[int] | None = None,
        loaded: Future[CascadePipeline] | None = None,
    ) -> Job:
        loaded = loaded or self.worker.pipeline
        # Outside the lock, because decoding a picture takes a while.
        pipeline = loaded.result()
        adapters = self._adapters(pipeline)
        adapted = None if adapters is None else adapters.slots
        job = Job(asked, asked.plan(pipeline, self.gallery.next_index(), self.sources, adapted), client)
        job.missing = job.missing if missing is None else missing
        if job.plan.edit is not None:
            self.sources.keep(job.plan.edit)
        self.sources.keep_conditions(job.plan.conditions)
        with self._lock:
            if loaded is not self.worker.pipeline:
                raise BusyError("another model was chosen meanwhile; ask again")
            self.line.put(job)
            self._jobs[job.id] = job
            over = [id for id, other in self._jobs.items() if other.over]
            for id in over[:-_REMEMBERED]:
                del self._jobs[id]
        self.hub.publish(Event("job", job.to_json(), f"job {job.id}"))
        return job

    def _loaded(self, loaded: Future[CascadePipeline]) -> None:
        self._publish_loaded(loaded)
        if loaded.exception() is None and self._kept.exists():
            self._resume()

    def _publish_loaded(self, loaded: Future[CascadePipeline]) -> None:
        error = loaded.exception()
        self.hub.publish(Event("model", {"error": "" if error is None else str(error)}))

    def _resume(self) -> None:
        for left in _read(self._kept):
            try:
                self._enter(parse(Asked, left["asked"], str(self._kept)), "earlier", set(left["missing"]))
            except (CascadeError, KeyError, TypeError) as error:
                logger.warning("%s: a job was not resumed: %s", self._kept, error)
        self._kept.unlink(missing_ok=True)


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        return list(read_json_file(path))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: not readable: %s", path, error)
        return []
