"""From prompts to a folder of pictures: records are planned into jobs, drawn in windows, and written one by one.

Reading (`cascade.prompts`), planning, drawing and writing know nothing of each other; `run_batch` joins them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cascade._version import __version__
from cascade.checkpoint import atomic_file
from cascade.config import SamplingConfig
from cascade.errors import CascadeError
from cascade.images import contact_sheet
from cascade.pipeline import CascadePipeline
from cascade.prompts import Failure, PromptRecord
from cascade.sampling import resolve_sampling

MANIFEST = "manifest.jsonl"
GRID_CELL = 256
"""Largest width of a picture on the contact sheet."""
GRID_PICTURES = 100
"""Pictures on the contact sheet, which shows the first ones."""
LOW_MEMORY_WINDOW = 64
"""Pictures that share one loading of the stages when memory is short."""
_NAME_LENGTH = 60


# --- planning --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawOptions:
    """What a call asks for, where a prompt's own line says nothing else. Names as in `CascadePipeline.__call__`.

    run_seed: from which the seeds of the prompts follow, for the manifest.
    sampling: steps, guidance, sampler, aug_level and threshold, each a value, {stage: value} or None.
    window: pictures drawn together, stage after stage; None: one batch.
    """

    run_seed: int
    num_images: int = 1
    negative_prompt: str | None = None
    until: int | None = None
    height: int | None = None
    width: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    batch_size: int | None = None
    window: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class Job:
    """A prompt with everything settled.

    overrides: the sampling arguments of its call. settings: what holds for each stage in the end.
    """

    record: PromptRecord
    negative_prompt: str
    num_images: int
    overrides: Mapping[str, Any]
    settings: Mapping[str, SamplingConfig]

    def fits(self, other: Job) -> bool:
        """Whether one call can draw both."""
        return self.num_images == other.num_images and self.settings == other.settings


def plan(pipeline: CascadePipeline, record: PromptRecord, options: DrawOptions) -> Job:
    """Settle what holds for a prompt. Raises CascadeError for settings that this cascade does not allow."""
    own = {"steps": record.steps, "guidance": record.guidance}
    overrides = {**options.sampling, **{name: value for name, value in own.items() if value is not None}}
    settings = resolve_sampling([slot.config for slot in pipeline.slots], options.preset, overrides)
    negative = options.negative_prompt if record.negative_prompt is None else record.negative_prompt
    return Job(record, negative or "", record.num_images or options.num_images, overrides, settings)


# --- drawing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A picture of a job: its number among the job's pictures, its stages by resolution, and its share of the time."""

    job: Job
    number: int
    stages: Mapping[int, Image.Image]
    seconds: float

    @property
    def image(self) -> Image.Image:
        """The picture of the last stage."""
        return self.stages[max(self.stages)]


def draw(pipeline: CascadePipeline, jobs: Iterable[Job], options: DrawOptions) -> Iterator[Drawn]:
    """Pictures in the order of the jobs, as their windows are finished."""
    for window in _windows(jobs, options.window or options.batch_size or pipeline.default_batch_size):
        start = time.perf_counter()
        first = window[0]
        result = pipeline(
            [job.record.prompt for job in window],
            negative_prompt=[job.negative_prompt for job in window],
            seed=[job.record.seed for job in window],
            num_images_per_prompt=first.num_images,
            until=options.until,
            height=options.height,
            width=options.width,
            preset=options.preset,
            batch_size=options.batch_size,
            progress=options.progress,
            **first.overrides,
        )
        seconds = (time.perf_counter() - start) / len(result.images)
        for position in range(len(result.images)):
            job, number = divmod(position, first.num_images)
            stages = {resolution: pictures[position] for resolution, pictures in result.stages.items()}
            yield Drawn(window[job], number, stages, seconds)


def _windows(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Consecutive jobs that one call can draw, with at most `size` pictures, or a single job with more."""
    window: list[Job] = []
    for job in jobs:
        if window and (not job.fits(window[0]) or (len(window) + 1) * job.num_images > size):
            yield window
            window = []
        window.append(job)
    if window:
        yield window


# --- writing ---------------------------------------------------------------------------------------------


class PictureFolder:
    """An output folder: pictures, each with what drew it inside, and a manifest that names every finished one."""

    def __init__(self, folder: str | Path, *, overwrite: bool = False, save_stages: bool = False) -> None:
        """Raises CascadeError when the folder cannot be written, or holds pictures of an earlier run.

        overwrite: begin anew; files of the same name are replaced. save_stages: keep the smaller pictures too.
        """
        self.folder = Path(folder)
        self._save_stages = save_stages
        self._manifest: TextIO | None = None
        self._thumbnails: list[tuple[str, Image.Image]] = []
        if (self.folder / MANIFEST).exists() and not overwrite:
            raise CascadeError(
                f"{self.folder}: holds the pictures of an earlier run; name another folder, or --overwrite"
            )
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # better to know now than after the first picture
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the manifest; a folder that was made for nothing goes again."""
        if self._manifest is not None:
            self._manifest.close()
        elif self._made:
            with suppress(OSError):  # not empty
                self.folder.rmdir()

    def write(self, drawn: Drawn, entry: Mapping[str, Any]) -> None:
        """Write the picture whole, then its line of the manifest. entry: what the manifest says of how it was drawn."""
        stem = file_stem(drawn.job, drawn.number)
        chunks = _text_chunks(entry)
        kept = {}
        if self._save_stages:
            for resolution in sorted(drawn.stages)[:-1]:
                kept[resolution] = f"stages/{stem}-{resolution}.png"
                self._save(kept[resolution], drawn.stages[resolution], chunks)
        file = f"{stem}.png"
        sha256 = self._save(file, drawn.image, chunks)
        stages = {"stages": kept} if kept else {}
        self._append({**entry, "file": file, **stages, "sha256": sha256, "seconds": round(drawn.seconds, 3)})
        if len(self._thumbnails) < GRID_PICTURES:
            thumbnail = drawn.image.copy()
            thumbnail.thumbnail((GRID_CELL, GRID_CELL))
            label = " ".join(drawn.job.record.prompt.split())[:_NAME_LENGTH]
            self._thumbnails.append((label, thumbnail))

    def write_grid(self, columns: int | None = None) -> None:
        """A contact sheet of the first pictures, grid.png."""
        if self._thumbnails:
            labels, images = zip(*self._thumbnails, strict=True)
            columns = columns or max(1, round(len(images) ** 0.5))
            sheet = contact_sheet(images, columns, labels)
            self._save("grid.png", sheet, PngInfo())

    def _save(self, name: str, image: Image.Image, chunks: PngInfo) -> str:
        """Write a PNG atomically; the SHA-256 of the file."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", pnginfo=chunks)
        with atomic_file(self.folder / name) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        return hashlib.sha256(buffer.getbuffer()).hexdigest()

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            if self._manifest is None:
                self._manifest = (self.folder / MANIFEST).open("w", encoding="utf-8")
            self._manifest.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._manifest.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> CascadeError:
        return CascadeError(
            f"{self.folder}: cannot be written: {error.strerror or error}; name another folder with --out"
        )


def file_stem(job: Job, number: int) -> str:
    """`000000-a-red-apple`, or `000000-1-a-red-apple` where a prompt has several pictures; ASCII, at most 60."""
    plain = unicodedata.normalize("NFKD", job.record.prompt).encode("ascii", "ignore").decode().lower()
    parts = [f"{job.record.index:06d}", *([str(number)] if job.num_images > 1 else []), *re.findall("[a-z0-9]+", plain)]
    return "-".join(parts)[:_NAME_LENGTH].rstrip("-")


def describe(pipeline: CascadePipeline, drawn: Drawn, options: DrawOptions) -> dict[str, Any]:
    """What a picture's metadata and its line of the manifest say: enough to draw the same bytes again."""
    job, record = drawn.job, drawn.job.record
    ran = pipeline.stage_names[: len(drawn.stages)]
    return {
        "index": record.index,
        "id": record.id or f"{record.index:06d}",
        "prompt": record.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": record.seed,
        "run_seed": options.run_seed,
        "number": drawn.number,
        "model": pipeline.name,
        "license": pipeline.license,
        "cascade": __version__,
        "settings": {
            "height": drawn.image.height,
            "width": drawn.image.width,
            "batch_size": options.batch_size or pipeline.default_batch_size,
            "device": pipeline.device.type,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "stages": {name: job.settings[name].model_dump(mode="json") for name in ran},
        },
    }


def _text_chunks(entry: Mapping[str, Any]) -> PngInfo:
    """International text chunks, which hold any Unicode; settings as JSON."""
    chunks = PngInfo()
    for name in ("prompt", "negative_prompt", "seed", "number", "model", "license", "cascade"):
        chunks.add_itxt(name, str(entry[name]))
    chunks.add_itxt("settings", json.dumps(entry["settings"]))
    return chunks


# --- all of it -------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """How a run went."""

    pictures: int = 0
    failures: int = 0


def run_batch(
    pipeline: CascadePipeline,
    records: Iterable[PromptRecord | Failure],
    options: DrawOptions,
    folder: PictureFolder,
    report: Callable[[Failure], None],
) -> Summary:
    """Draw and write every record; `report` hears of each that cannot be drawn, and the others go on."""
    summary = Summary()

    def fail(failure: Failure) -> None:
        summary.failures += 1
        report(failure)

    # What the call itself asks for is checked first: if that is wrong, no line of the file is to blame.
    resolve_sampling([slot.config for slot in pipeline.slots], options.preset, options.sampling)
    for drawn in draw(pipeline, _planned(pipeline, records, options, fail), options):
        folder.write(drawn, describe(pipeline, drawn, options))
        summary.pictures += 1
    return summary


def _planned(
    pipeline: CascadePipeline,
    records: Iterable[PromptRecord | Failure],
    options: DrawOptions,
    fail: Callable[[Failure], None],
) -> Iterator[Job]:
    for record in records:
        if isinstance(record, Failure):
            fail(record)
            continue
        try:
            yield plan(pipeline, record, options)
        except CascadeError as error:
            fail(Failure(record.origin, str(error)))
