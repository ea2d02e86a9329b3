"""A batch from start to end: the request as one object, and its outcome."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from cascade.batch.folder import WEBDATASET, Layout
from cascade.batch.matrix import Matrix, write_sheet
from cascade.batch.metadata import model_identity, versions
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Planner
from cascade.batch.reports import Progress, write_animation, write_grid, write_page, write_parquet
from cascade.batch.run import LOW_MEMORY_WINDOW, Summary, run_batch
from cascade.config.values import SETTINGS
from cascade.drawing.arguments import PerStage, one_of
from cascade.drawing.changes import Changes, GivenRegions, regions_of
from cascade.drawing.engine import BatchSize
from cascade.drawing.recipe import LONG_PROMPTS
from cascade.errors import CascadeError, quoted
from cascade.pictures.finish import Finish, read_palette
from cascade.pictures.format import PictureFormat
from cascade.pictures.rasters import ARRAY_FORMATS, Background, file_formats
from cascade.pipeline import CascadePipeline
from cascade.prompts.reading import between_seeds, given_prompts, prompts_of_set, read_prompts, way_between
from cascade.prompts.records import Failure, PromptRecord
from cascade.prompts.sources import count_prompts
from cascade.resources.number_format import settled_dtype
from cascade.storage.index import read_index
from cascade.storage.pipeline import with_adapters_scaled
from cascade.storage.stage import adapters_for, read_adapter, read_config
from cascade.system.device import choose_device

_GUIDANCE = ("guidance_rescale", "projection", "guidance_of")
"""Sampling settings that only drawing into a folder and the pipeline take from the caller."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a batch.

    folder: folder of the pictures. seed: the run's. pictures: number in the folder; kept: those among them from earlier
    runs; failures: prompts and pictures that could not be drawn, listed in failures.jsonl. stopped: there is more to
    draw, and the same call continues. speaks: whether this process, among several, reports the result; the counts of
    the others are not valid.
    """

    folder: Path
    seed: int
    pictures: int = 0
    kept: int = 0
    failures: int = 0
    stopped: bool = False
    speaks: bool = True


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """The arguments of `cascade generate`, with the names and meanings of its options.

    prompts: texts to draw; file: a prompt file instead. lora: adapters, `[STAGE=]FOLDER[:SCALE]`. manifest:
    "parquet" for a table in addition to the JSON lines. format: None: png, or tiff where png cannot hold the pictures.
    background: behind transparent parts. scale, nearest: each pixel becomes a square of this side. palette: a number
    of colours, or a file of them.
    """

    out: str
    prompts: Sequence[str] = ()
    file: str | None = None
    strict: bool = False
    model: str | None = None
    lora: Sequence[str] = ()
    overwrite: bool = False
    format: str | None = None
    background: Background = "none"
    scale: int | None = None
    nearest: bool = False
    palette: str | int | None = None
    tar_size: int = 1000
    manifest: str = "jsonl"
    html: bool = False
    shard: tuple[int, int] = (0, 1)
    seed: int | None = None
    num_images_per_prompt: int = 1
    negative_prompt: str | None = None
    steps: PerStage[int] = None
    guidance: PerStage[float] = None
    sampler: PerStage[str | Mapping[str, Any]] = None
    aug_level: PerStage[float] = None
    threshold: PerStage[float | str] = None
    guidance_rescale: PerStage[float] = None
    projection: PerStage[Mapping[str, Any]] = None
    preset: str | None = None
    until: int | None = None
    height: int | None = None
    width: int | None = None
    save_stages: bool = False
    image: str | None = None
    mask: str | None = None
    strength: PerStage[float] = None
    extend: Mapping[str, int] | None = None
    resampling: int = 1
    known: str = "noised"
    variation: tuple[int, float] | None = None
    prompt_language: bool = False
    long_prompts: str = "cut"
    default_style: str | None = None
    regions: GivenRegions | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    guidance_of: Mapping[str, float] | None = None
    prompt_sets: bool = False
    wildcards: str = "."
    travel: tuple[str, str] | None = None
    frames: int = 24
    travel_seed: int | None = None
    matrix: Sequence[str] = ()
    grid: bool = False
    device: str | None = None
    dtype: str | None = None
    batch_size: BatchSize = None
    low_memory: bool = False
    text_8bit: bool = False
    window: int | None = None

    def run(self, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Draw everything that the folder does not hold yet.

        stop: called regularly; True ends the run early. Raises CascadeError if the request itself cannot be satisfied.
        """
        self._check()
        progress = progress or Progress()
        with Output(self.out, self._layout(), overwrite=self.overwrite, extras=self._extras()) as output:
            self._check_split(output)
            pipeline_in = cache(self._pipeline)
            settled = output.begin(self._settings(), lambda settled: self._check_drawable(settled, pipeline_in))
            run_seed = settled["seed"]
            lines = None if self.matrix else self._lines(run_seed)
            pipeline = pipeline_in(settled["dtype"])
            options = self._options(run_seed, pipeline)
            records = self._cells(run_seed, Planner(pipeline, options)) if lines is None else lines
            progress.begin(self._total(output))
            summary = run_batch(pipeline, records, options, output, progress, stop=stop)
            progress.end()
            return self._finish(output, summary, run_seed)

    def changes(self) -> Changes:
        """The picture to change, and how."""
        if self.extend is not None and not isinstance(self.extend, Mapping):
            raise CascadeError("extend: expected sides and pixels, such as left=64,top=32")
        changes = self.strength, self.extend, self.resampling, self.variation, self.known
        return Changes(self.image, self.mask, *changes)

    def _cells(self, run_seed: int, planner: Planner) -> Iterable[PromptRecord | Failure]:
        """The cells of the matrix. Raises CascadeError for a value that cannot be drawn."""
        matrix, prompt = Matrix.read(self.matrix), self._prompt_of_matrix()
        for record in matrix.first_of_each(prompt, run_seed):
            try:
                planner.job(record)
            except CascadeError as error:
                raise CascadeError(f"{record.origin}: {error}") from None
        return matrix.records(prompt, run_seed)

    def _lines(self, run_seed: int) -> Iterable[PromptRecord | Failure]:
        """The lines to draw."""
        if self.file:
            names = {name for folder in read_index(self.model).stages for name in read_config(folder).conditions}
            return read_prompts(self.file, run_seed, names)
        lines = given_prompts(self._texts(), run_seed)
        return lines if self.travel_seed is None else between_seeds(list(lines), self.travel_seed)

    def _prompt_of_matrix(self) -> str:
        return self.prompts[0] if self.prompts else ""

    @property
    def _travels(self) -> bool:
        """Whether the pictures are frames from one picture to another."""
        return self.travel is not None or self.travel_seed is not None

    def _texts(self) -> Sequence[str]:
        """The prompts of the call, with sets written out."""
        if self.travel is not None:
            return way_between(*self.travel, self.frames)
        if self.travel_seed is not None:
            return list(self.prompts) * self.frames
        if self.conditions and not self.prompts:
            return [""]
        if not self.prompt_sets:
            return self.prompts
        return [prompt for text in self.prompts for prompt in prompts_of_set(text, self.wildcards)]

    def _check(self) -> None:
        sources = sum((bool(self.prompts), bool(self.file), self.travel is not None))
        if self.matrix:
            self._check_matrix(Matrix.read(self.matrix))
        elif sources != 1 and not (sources == 0 and self.conditions):
            raise CascadeError("give either prompts or --prompts FILE (or --travel A B)")
        if self.travel_seed is not None and (self.matrix or self.prompt_sets or len(self.prompts) > 1 or self.file):
            raise CascadeError("--travel-seed: leads from one picture to another; give one prompt, or --travel A B")
        if self.prompt_sets and not self.prompts:
            raise CascadeError("--prompt-sets: is for prompts of the command line; write the prompts of a file out")
        if self._travels and (self.format == WEBDATASET or self.shard[1] > 1):
            raise CascadeError("--travel: the frames are one sequence; leave out --shard and tar shards")
        if self.html and self.format == WEBDATASET:
            raise CascadeError("--html: a page cannot show pictures inside tar shards; choose another --format")

    def _check_matrix(self, matrix: Matrix) -> None:
        other = {"--prompts": self.file, "--travel": self.travel, "--prompt-sets": self.prompt_sets or None}
        for name, value in other.items():
            if value is not None:
                raise CascadeError(f"--matrix: cannot be combined with {name}; an axis can hold prompts, prompt=A|B")
        if len(self.prompts) != (0 if matrix.has_prompts else 1):
            expected = "no other prompt than those of its axis" if matrix.has_prompts else "one prompt"
            raise CascadeError(f"--matrix: {len(self.prompts)} prompts; expected {expected}")
        if self.num_images_per_prompt > 1:
            raise CascadeError("--matrix: has one picture per cell; leave out -n, or give an axis of seeds, seed=1..4")
        if self.format == WEBDATASET or self.shard[1] > 1:
            raise CascadeError("--matrix: is one sheet; leave out --shard and tar shards")
        if matrix.has_adapters and not self.lora:
            raise CascadeError("--matrix lora: there is no adapter to scale; name it with --lora")

    def _check_drawable(self, settled: Mapping[str, Any], pipeline_in: Callable[[str], CascadePipeline]) -> None:
        """Raises CascadeError for what would end the run before its first picture, when an older one goes for it."""
        if self.file:
            count_prompts(self.file)
        Planner(pipeline_in(settled["dtype"]), self._options(settled["seed"]))

    def _extras(self) -> list[tuple[str, str]]:
        """Additional files to write, as (stem, ending)."""
        asked = {
            ("grid", ".png"): self.grid,
            ("travel", ".webp"): self._travels,
            ("matrix", ".png"): bool(self.matrix),
            ("manifest", ".parquet"): self.manifest == "parquet",
        }
        return [name for name, wanted in {**asked, ("index", ".html"): self.html}.items() if wanted]

    def _layout(self) -> Layout:
        return Layout(self._format(), self.tar_size, self.shard, self._finishing, self._held_by()[0])

    @cached_property
    def _form(self) -> PictureFormat:
        """The format of the model's pictures."""
        return read_config(read_index(self.model).stages[0]).pictures

    @cached_property
    def _finishing(self) -> Finish:
        """What is done to drawn pictures. Raises CascadeError for what this model's pictures cannot have."""
        if (self.scale is not None) != self.nearest:
            raise CascadeError("--scale N and --nearest belong together; `cascade upscale` enlarges with a network")
        palette = None if self.palette is None else read_palette(str(self.palette))
        scale = 1 if self.scale is None else self.scale
        finish = Finish.of({"palette": palette, "scale": scale, "background": self.background})
        finish.check(self._form)
        return finish

    def _held_by(self) -> tuple[str, ...]:
        """The file formats that hold the finished pictures."""
        return file_formats(self._finishing.result(self._form))

    def _format(self) -> str:
        """The file format. Raises CascadeError for one that does not hold the pictures."""
        held_by = self._held_by()
        format = self.format or held_by[0]
        if format != WEBDATASET and format not in held_by:
            hint = ", or give --background white" if self._form.alpha else ""
            raise CascadeError(f"--format {format}: cannot hold {self._form}; choose one of {', '.join(held_by)}{hint}")
        if self.palette is not None and format in ("jpeg", "webp"):
            raise CascadeError(f"--palette: {format} does not keep colours as they are; choose --format png")
        if self.html and format in ARRAY_FORMATS:
            raise CascadeError(f"--html: a page cannot show {format} files; choose another --format")
        return format

    def _check_split(self, output: Output) -> None:
        """Raises CascadeError unless several processes or shards can read the same prompts and have the same seed."""
        if output.team.count > 1 and self.file == "-":
            raise CascadeError("--prompts -: several processes cannot share standard input; name a file")
        if self.shard[1] > 1 and self.seed is None:
            raise CascadeError("--shard: shards need the same seed; give one with --seed")

    def _settings(self) -> dict[str, Any]:
        """Settings that decide the bytes of the output; `Output` refuses to continue a run with other ones."""
        device = choose_device(self.device)
        own = ("seed", "num_images_per_prompt", "negative_prompt", *SETTINGS, "preset", "until", "height", "width")
        newer = {name: value for name in _GUIDANCE if (value := getattr(self, name)) is not None}
        newer |= {} if self.default_style is None else {"default_style": self.default_style}
        newer |= {"matrix": list(self.matrix)} if self.matrix else {}
        stored = ("batch_size", "format", "save_stages")
        return {
            "versions": versions(),
            "model": model_identity(read_index(self.model)),
            **self._adapter_digests(),
            **{name: getattr(self, name) for name in (*own, *stored)},
            "format": self._format(),
            **self._finishing.described(),
            **newer,
            "tar_size": self.tar_size if self.format == WEBDATASET else None,
            "device": device.type,
            "dtype": self._dtype(device),
        }

    def _dtype(self, device: torch.device) -> str | dict[str, str]:
        """The number format; if none was requested, that of the run to continue, or the fastest here."""
        configs = map(read_config, read_index(self.model).stages)
        name = str(settled_dtype(self.dtype, device, configs)).removeprefix("torch.")
        return {"auto": name} if self.dtype == "auto" else name

    def _pipeline(self, dtype: str) -> CascadePipeline:
        return CascadePipeline.from_pretrained(
            self.model,
            device=self.device,
            dtype=dtype,
            low_memory=self.low_memory,
            text_8bit=self.text_8bit,
            adapters=self.adapters(),
        )

    def adapters(self) -> dict[str, list[str]]:
        """The adapters by stage, as for `CascadePipeline.from_pretrained`."""
        if not self.lora:
            return {}
        return adapters_for(self.lora, [read_config(folder).name for folder in read_index(self.model).stages])

    def _adapter_digests(self) -> dict[str, Any]:
        """The run's setting on adapters; none without any, as in earlier versions."""
        found = {name: map(read_adapter, several) for name, several in self.adapters().items()}
        digests = {name: {one.digest: one.scale for one in several} for name, several in found.items()}
        return {"adapters": digests} if digests else {}

    def _options(self, run_seed: int, pipeline: CascadePipeline | None = None) -> DrawOptions:
        adapters = self.adapters() if self.matrix and pipeline is not None else {}
        return DrawOptions(
            run_seed=run_seed,
            num_images=self.num_images_per_prompt,
            negative_prompt=self.negative_prompt,
            until=self.until,
            height=self.height,
            width=self.width,
            sampling={name: getattr(self, name) for name in (*SETTINGS, *_GUIDANCE)},
            preset=self.preset,
            batch_size=self.batch_size,
            window=self.window or (LOW_MEMORY_WINDOW if self.low_memory else None),
            save_stages=self.save_stages,
            changes=self.changes(),
            language=self.prompt_language or self.travel is not None,
            long_prompts=one_of("long_prompts", self.long_prompts, LONG_PROMPTS),
            default_style=self.default_style,
            regions=regions_of(self.regions),
            conditions=self.conditions,
            strict=self.strict,
            low_memory=self.low_memory,
            adapted=with_adapters_scaled(pipeline, self.model, adapters) if adapters and pipeline is not None else None,
        )

    def _total(self, output: Output) -> int | None:
        """Approximate number of pictures of this process."""
        if self.matrix:
            return len(Matrix.read(self.matrix))
        prompts = count_prompts(self.file) if self.file else len(self._texts())
        if prompts is None:
            return None
        return -(-prompts * self.num_images_per_prompt // (self.shard[1] * output.team.count))

    def _finish(self, output: Output, summary: Summary, run_seed: int) -> Outcome:
        """Finish the output once all is drawn; with several processes, the first does it for all."""
        output.team.wait_for_the_others()
        stopped = summary.stopped or not output.is_everything_done(summary.last_unit)
        if output.team.rank > 0:
            return Outcome(output.folder, run_seed, stopped=stopped, speaks=False)
        output.manifest.refresh()
        counts = output.manifest.count(), output.kept(), output.failures()
        if not stopped:
            output.complete()
        self._write_extras(output)
        return Outcome(output.folder, run_seed, *counts, stopped)

    def _write_extras(self, output: Output) -> None:
        entries, read, form = output.manifest.entries, output.read, self._form
        if output.manifest.count() == 0:
            return
        if self.grid:
            columns = self.num_images_per_prompt if self.num_images_per_prompt > 1 else None
            output.write_with("grid", ".png", lambda path: write_grid(entries(), read, path, columns, form))
        if self._travels:
            output.write_with("travel", ".webp", lambda path: write_animation(entries(), read, path, form))
        if self.matrix:
            matrix, title = Matrix.read(self.matrix), self._prompt_of_matrix()
            output.write_with("matrix", ".png", lambda path: write_sheet(matrix, entries(), read, path, title, form))
        if self.manifest == "parquet":
            output.write_with("manifest", ".parquet", lambda path: write_parquet(entries(), path))
        if self.html:
            title = Path(self.out).resolve().name
            output.write_with("index", ".html", lambda path: write_page(entries(), path, title))


def generate_files(prompts: str | Path | Sequence[str], out: str | Path, **options: Any) -> Outcome:
    """Draw prompts into a folder of pictures with a manifest, as `cascade generate` does; finished pictures are kept.

    prompts: a prompt, several, or the Path of a prompt file. options: fields of `BatchRequest` such as `seed`, `model`,
    `num_images_per_prompt`, `until`, `steps`, `format`, `html`. The same call continues after a stop or a kill.
    Raises CascadeError if nothing can be drawn; single prompts that fail are listed in `failures.jsonl`.
    """
    names = [each.name for each in fields(BatchRequest) if each.name not in ("out", "prompts", "file")]
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise CascadeError(
                f"generate_files: {quoted(name)} is not known" + (f"; did you mean {close[0]}?" * bool(close))
            )
    if isinstance(prompts, Path):
        return BatchRequest(out=str(out), file=str(prompts), **options).run()
    return BatchRequest(out=str(out), prompts=[prompts] if isinstance(prompts, str) else prompts, **options).run()
