"""The queue that everyone shares: jobs are drawn one after the other, can be stopped, and outlast a restart."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError
from cascade.files.parsed import read_json_file
from cascade.pipeline import CascadePipeline
from cascade.server.asked import Asked
from cascade.server.events import Event, Hub
from cascade.server.gallery import Gallery
from cascade.server.jobs import Job
from cascade.server.waiting import WaitingLine
from cascade.server.worker import Worker
from cascade.settings import parse

logger = logging.getLogger("cascade.server")
MOST_WAITING = 500
"""Pictures that may wait unless the caller says otherwise."""
_REMEMBERED = 100  # jobs that are over and still told of


class BusyError(CascadeError):
    """Something that must wait until nothing is drawn."""


class Queue:
    """Jobs of all clients. `load` gives the pipeline, in the thread that draws: a page is there before it."""

    def __init__(
        self, load: Callable[[], CascadePipeline], gallery: Gallery, *, most_waiting: int = MOST_WAITING
    ) -> None:
        self.hub, self.gallery = Hub(), gallery
        self.line = WaitingLine(most_waiting)
        self.sources = gallery.sources()
        self.worker = Worker(load, self.line, gallery, self.hub)
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._kept = gallery.state / "queue.json"

    def start(self) -> None:
        """Begin; what an earlier process left undone is taken up again as soon as the model is there."""
        self.worker.pipeline.add_done_callback(self._loaded)
        self.worker.start()

    def close(self) -> None:
        """Stop after the step at hand, and write down what is not done."""
        self.worker.close()
        self.hub.close()
        left = [{"asked": job.asked.to_json(), "missing": sorted(job.missing)} for job in self.jobs() if not job.over]
        if left:
            self._kept.write_text(json.dumps(left), encoding="utf-8")

    @property
    def pipeline(self) -> CascadePipeline:
        """The model; waits while it is loaded. Raises what went wrong with that."""
        return self.worker.pipeline.result()

    def submit(self, asked: Asked, client: str) -> Job:
        """Have something drawn. Raises CascadeError for what cannot be, FullError when too much waits."""
        return self._enter(asked.settled(), client)

    def stop(self, job: Job) -> None:
        """Draw no more of a job; what is there of it is kept."""
        job.stopping = not job.over
        for piece in self.line.drop(job):
            job.settle(piece.target.number)
        self.hub.publish(Event("job", job.to_json(), f"job {job.id}"))

    def switch(self, load: Callable[[], CascadePipeline]) -> None:
        """Draw with another model. Raises BusyError while anything waits or is drawn."""
        with self._lock:
            if not self.worker.pipeline.done() or any(not job.over for job in self._jobs.values()):
                raise BusyError("pictures wait or are drawn; choose another model when they are done")
            self.worker.switch(load)
            self.worker.pipeline.add_done_callback(self._told)
        self.hub.publish(Event("state", {"ready": False, "error": "", "jobs": [job.to_json() for job in self.jobs()]}))

    def job(self, id: str) -> Job:
        """By its name. Raises KeyError."""
        with self._lock:
            return self._jobs[id]

    def jobs(self) -> list[Job]:
        """Those under way, and some that are over, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def seconds_left(self) -> float:
        """Until everything is drawn that waits now, about."""
        open = [(job, len(job.missing)) for job in self.jobs() if not job.over]
        pace = self.worker.pace
        return sum(count * pace.seconds(job.targets()[0].task().passes) for job, count in open if count)

    def _enter(self, asked: Asked, client: str, missing: set[int] | None = None) -> Job:
        loaded = self.worker.pipeline
        # Outside the lock: a picture to change takes a while to decode.
        job = Job(asked, asked.plan(loaded.result(), self.gallery.next_index(), self.sources), client)
        job.missing = job.missing if missing is None else missing
        if job.plan.edit is not None:
            self.sources.keep(job.plan.edit)
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
        self._told(loaded)
        if loaded.exception() is None and self._kept.exists():
            self._resume()

    def _told(self, loaded: Future[CascadePipeline]) -> None:
        error = loaded.exception()
        self.hub.publish(Event("model", {"error": "" if error is None else str(error)}))

    def _resume(self) -> None:
        for left in _read(self._kept):
            try:
                self._enter(parse(Asked, left["asked"], str(self._kept)), "earlier", set(left["missing"]))
            except (CascadeError, KeyError, TypeError) as error:
                logger.warning("%s: not taken up again: %s", self._kept, error)
        self._kept.unlink(missing_ok=True)


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        return list(read_json_file(path))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: not readable: %s", path, error)
        return []
