"""What is to be drawn: a record with everything settled, its pictures, and where each will stand."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade.config import SamplingConfig
from cascade.pipeline import CascadePipeline
from cascade.prompts import PromptRecord
from cascade.sampling import resolve_sampling

FILES_PER_FOLDER = 10_000
"""Pictures in one folder, beyond which subfolders begin."""
_NAME_LENGTH = 60


@dataclass(frozen=True)
class DrawOptions:
    """What a call asks for, where a prompt's own line says nothing else. Names as in `CascadePipeline.__call__`.

    run_seed: from which the seeds of the prompts follow, for the manifest.
    sampling: steps, guidance, sampler, aug_level and threshold, each a value, {stage: value} or None.
    batch_size: for all stages, or {stage: size}; "auto" begins with what should fit, and halves after an out-of-memory.
    window: prompts drawn together, stage after stage; None: one batch. save_stages: keep the smaller pictures.
    """

    run_seed: int
    num_images: int = 1
    negative_prompt: str | None = None
    until: int | None = None
    height: int | None = None
    width: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    batch_size: int | Mapping[str, int] | str | None = None
    window: int | None = None
    save_stages: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt with everything settled. settings: what holds for each stage in the end."""

    record: PromptRecord
    negative_prompt: str
    num_images: int
    settings: Mapping[str, SamplingConfig]

    @property
    def id(self) -> str:
        """The line's own id, or its index."""
        return self.record.id or f"{self.record.index:06d}"

    def tasks(self) -> Iterator[Task]:
        """Its pictures."""
        return (Task(self, number) for number in range(self.num_images))


@dataclass(frozen=True)
class Task:
    """One picture: its number among those of the job."""

    job: Job
    number: int

    @property
    def stem(self) -> str:
        """`000000-a-red-apple`, or `000000-1-a-red-apple` where a prompt has several; ASCII, at most 60."""
        prompt = self.job.record.prompt[: 20 * _NAME_LENGTH]  # what follows cannot show, and may be long
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        number = [str(self.number)] if self.job.num_images > 1 else []
        parts = [f"{self.job.record.index:06d}", *number, *re.findall("[a-z0-9]+", plain)]
        return "-".join(parts)[:_NAME_LENGTH].rstrip("-")


def plan(pipeline: CascadePipeline, record: PromptRecord, options: DrawOptions) -> Job:
    """Settle what holds for a prompt. Raises CascadeError for settings that this cascade does not allow."""
    own = {"steps": record.steps, "guidance": record.guidance}
    overrides = {**options.sampling, **{name: value for name, value in own.items() if value is not None}}
    settings = resolve_sampling([slot.config for slot in pipeline.slots], options.preset, overrides)
    negative = options.negative_prompt if record.negative_prompt is None else record.negative_prompt
    return Job(record, negative or "", record.num_images or options.num_images, settings)


def subfolder(index: int, num_images: int) -> str:
    """`0003/` for the pictures of a prompt beyond the first 10,000 files, which stand in the folder itself.

    By the prompt's index alone, so that neither order nor the number of processes moves a picture.
    """
    group = index // max(1, FILES_PER_FOLDER // num_images)
    return f"{group:04d}/" if group else ""
