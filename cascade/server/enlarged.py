"""Enlarging an uploaded picture as a planned job, so that queue and gallery treat it like drawing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cascade.batch.plan import Job, Target
from cascade.drawing.recipe import Recipe
from cascade.drawing.task import Drawn, Task
from cascade.upscaling import fitted


@dataclass(frozen=True, eq=False, kw_only=True)
class EnlargedJob(Job):
    """Plan for one picture enlarged from another. task: for the engine."""

    task: Task

    def targets(self) -> Iterator[Target]:
        """The picture."""
        yield EnlargedTarget(self, 0)


@dataclass(frozen=True)
class EnlargedTarget(Target):
    """The picture of an `EnlargedJob`."""

    job: EnlargedJob

    @property
    def recipe(self) -> Recipe:
        """See `Target.recipe`."""
        return self.job.task.recipe

    def task(self) -> Task:
        """See `Target.task`."""
        return replace(self.job.task, name=str(self.job.record.index))

    def fitted(self, drawn: Drawn) -> Drawn:
        """The picture at the requested size: area means of the last stage's picture."""
        size = self.recipe.height, self.recipe.width
        form = self.job.slots[-1].config.pictures
        return replace(drawn, pixels=[fitted(drawn.pixels[-1][None], size, form)[0]])
