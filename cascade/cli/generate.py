"""`cascade generate`: pictures from prompts, into a folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cascade.cli.paths import path_option
from cascade.errors import CascadeError
from cascade.seeds import MAX_SEED
from cascade.system import STOP_SIGNALS
from cascade.values import PRESETS, SETTINGS, number, per_stage, threshold_value, whole_number

if TYPE_CHECKING:
    from cascade.batch import DrawOptions, Layout, Output, Progress, Summary
    from cascade.drawing.changes import Changes
    from cascade.pipeline import CascadePipeline


def for_stages(
    name: str, convert: Callable[[str], Any], help: str, metavar: str = "[STAGE=]VALUE,..."
) -> Callable[[Any], Any]:
    """An option that takes `20` for all stages, or `base=20,sr256=4`."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else per_stage(text, convert)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from None

    return click.option(name, callback=read, metavar=metavar, help=help)


_POSITIVE = click.IntRange(min=1)


def _batch_size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        size = whole_number(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; expected one of at least 1, or auto.") from None
    if size < 1:
        raise click.BadParameter(f"{size} is not in the range x>=1.")
    return size


def _shard(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, int]:
    if text is None:
        return (0, 1)
    which, _, count = text.partition("/")
    if which.isdecimal() and count.isdecimal() and 1 <= int(which) <= int(count):
        return (int(which) - 1, int(count))
    raise click.BadParameter(f"{text!r}; expected which of how many, such as 3/16.")


@click.command()
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@path_option("--prompts", "file", metavar="FILE", help="Prompts: .txt, .jsonl, .csv, .tsv, .parquet, a folder, or `-`.")
@click.option("--strict", is_flag=True, help="Stop at the first line that cannot be drawn.")
@path_option(
    "--from-image", metavar="FILE", help="Draw a picture again, to the same bytes, from what it says of itself."
)
@path_option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade.")
@path_option("--out", default="out", show_default=True, metavar="FOLDER", help="Where the pictures go.")
@click.option("--overwrite", is_flag=True, help="Begin anew in a folder with pictures of an earlier run; they go.")
@click.option("--format", type=click.Choice(("png", "webp", "jpeg", "webdataset")), default="png", show_default=True)
@click.option("--tar-size", type=_POSITIVE, default=1000, show_default=True, help="Prompts in a shard of webdataset.")
@click.option("--manifest", type=click.Choice(("jsonl", "parquet")), default="jsonl", help="Parquet: beside the JSONL.")
@click.option("--html", is_flag=True, help="Also write a page of pictures beside prompts, FOLDER/index.html.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Draw only the I-th of N parts, such as 3/16.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Same seed, same pictures; default: drawn and reported.")
@click.option("-n", "--num-images-per-prompt", type=_POSITIVE, default=1, show_default=True)
@click.option("--negative-prompt", metavar="TEXT", help="What the pictures should not be like.")
@for_stages("--steps", whole_number, "Sampling steps, e.g. 20 or base=20,sr256=4.")
@for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@for_stages("--sampler", str, "By name; docs/configuration.md lists them.")
@for_stages("--aug-level", number, "Noise on the smaller picture, 0 to 1.")
@for_stages("--threshold", threshold_value, "A quantile such as 0.995, clip, or none.")
@click.option("--preset", type=click.Choice(PRESETS), help="Steps and samplers chosen for speed or quality.")
@click.option("--until", type=_POSITIVE, help="Stop after the stage of this size, in pixels.")
@click.option("--height", type=_POSITIVE, help="Of the pictures, in pixels.")
@click.option("--width", type=_POSITIVE, help="Of the pictures, in pixels.")
@click.option("--save-stages", is_flag=True, help="Keep the smaller pictures too, in FOLDER/stages.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, FOLDER/grid.png.")
@path_option("--image", metavar="FILE", help="A picture to change, see docs/editing.md.")
@path_option("--mask", metavar="FILE", help="White where the picture is drawn anew; elsewhere every bit stays.")
@for_stages("--strength", number, "0 gives the picture back, 1 ignores it; default: 0.85, with a mask 1.")
@for_stages("--extend", whole_number, "Draw beyond the picture, in pixels, such as left=64,top=32.", "SIDE=PIXELS,...")
@click.option("--resampling", type=_POSITIVE, default=1, show_default=True, help="With a mask: rounds of each step.")
@click.option(
    "--variation", nargs=2, type=(int, float), metavar="SEED SHARE", help="Go this far to another seed's noise."
)
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option("--dtype", help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU that has it.")
@click.option("--batch-size", callback=_batch_size, metavar="N", help="Pictures per network call; or auto: what fits.")
@click.option("--low-memory", is_flag=True, help="Hold one stage in memory at a time, for a window of prompts.")
@click.option("--text-8bit", is_flag=True, help="Text encoder in 8 bits; needs the extra `quantized`.")
@click.option("--window", type=_POSITIVE, help="Prompts drawn together; default: a batch, 64 with --low-memory.")
@click.option("--log-json", is_flag=True, help="For machines: a line of JSON for everything that happens, on stdout.")
@click.option("--quiet", is_flag=True, help="Say nothing but what failed.")
def generate(**values: Any) -> int:
    """Draw pictures.

    \b
    cascade generate "a red apple" "two blue stars" --seed 7
    cascade generate --prompts prompts.jsonl --out pictures
    """
    request = Request(**values)
    if request.from_image is not None:
        from cascade.cli.redraw import redraw

        if request.prompts or request.file:
            raise CascadeError("--from-image: the picture says what to draw; give no prompts beside it")
        return redraw(
            request.from_image,
            model=request.model,
            out=request.out,
            device=request.device,
            changes=request.changes(),
            overwrite=request.overwrite,
        )
    if bool(request.prompts) == bool(request.file):
        raise CascadeError("give either prompts or --prompts FILE")
    if request.html and request.format == "webdataset":
        raise CascadeError("--html: a page cannot show pictures inside tar shards; choose another --format")
    return request.run()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for; one field an option."""

    prompts: tuple[str, ...]
    file: str | None
    strict: bool
    from_image: str | None
    model: str | None
    out: str
    overwrite: bool
    format: str
    tar_size: int
    manifest: str
    html: bool
    shard: tuple[int, int]
    seed: int | None
    num_images_per_prompt: int
    negative_prompt: str | None
    steps: int | dict[str, int] | None
    guidance: float | dict[str, float] | None
    sampler: str | dict[str, str] | None
    aug_level: float | dict[str, float] | None
    threshold: float | str | dict[str, float | str] | None
    preset: str | None
    until: int | None
    height: int | None
    width: int | None
    save_stages: bool
    image: str | None
    mask: str | None
    strength: float | dict[str, float] | None
    extend: dict[str, int] | None
    resampling: int
    variation: tuple[int, float] | None
    grid: bool
    device: str | None
    dtype: str | None
    batch_size: int | str | None
    low_memory: bool
    text_8bit: bool
    window: int | None
    log_json: bool
    quiet: bool

    def run(self) -> int:
        """Draw everything; the exit status."""
        from cascade.batch import Output, run_batch
        from cascade.prompts import given_prompts, read_prompts

        with Output(self.out, self._layout(), overwrite=self.overwrite, extras=self._extras()) as output:
            self._check_split(output)
            run_seed = output.begin(self._settings())["seed"]
            records = read_prompts(self.file, run_seed) if self.file else given_prompts(self.prompts, run_seed)
            pipeline = self._pipeline()
            progress = self._progress()
            progress.begin(self._total(output))
            with _told_to_stop() as stop:
                summary = run_batch(
                    pipeline, records, self._options(run_seed), output, progress,
                    strict=self.strict, low_memory=self.low_memory, stop=stop,
                )  # fmt: skip
            progress.end()
            return self._finish(output, summary, run_seed)

    def _extras(self) -> list[tuple[str, str]]:
        """What is written beside the pictures, as (stem, ending)."""
        asked = {("grid", ".png"): self.grid, ("manifest", ".parquet"): self.manifest == "parquet"}
        return [name for name, wanted in {**asked, ("index", ".html"): self.html}.items() if wanted]

    def _layout(self) -> Layout:
        from cascade.batch import Layout

        return Layout(self.format, self.tar_size, self.shard)

    def _check_split(self, output: Output) -> None:
        """Several processes read the same prompts and must know the same seed."""
        if output.team.count > 1 and self.file == "-":
            raise CascadeError("--prompts -: several processes cannot share standard input; name a file")
        if self.shard[1] > 1 and self.seed is None:
            raise CascadeError("--shard: shards need the same seed; give one with --seed")

    def _settings(self) -> dict[str, Any]:
        """What decides the bytes of the output; `Output` refuses to continue a run of which any was different."""
        from cascade.batch.identity import model_identity, versions
        from cascade.load import choose_device, choose_dtype, read_index

        device = choose_device(self.device)
        own = ("seed", "num_images_per_prompt", "negative_prompt", *SETTINGS, "preset", "until", "height", "width")
        stored = ("batch_size", "format", "save_stages")
        return {
            "versions": versions(),
            "model": model_identity(read_index(self.model)),
            **{name: getattr(self, name) for name in (*own, *stored)},
            "tar_size": self.tar_size if self.format == "webdataset" else None,
            "device": device.type,
            "dtype": str(choose_dtype(self.dtype, device)).removeprefix("torch."),
        }

    def _pipeline(self) -> CascadePipeline:
        from cascade.pipeline import CascadePipeline

        return CascadePipeline.from_pretrained(
            self.model, device=self.device, dtype=self.dtype, low_memory=self.low_memory, text_8bit=self.text_8bit
        )

    def _options(self, run_seed: int) -> DrawOptions:
        from cascade.batch import LOW_MEMORY_WINDOW, DrawOptions

        return DrawOptions(
            run_seed=run_seed,
            num_images=self.num_images_per_prompt,
            negative_prompt=self.negative_prompt,
            until=self.until,
            height=self.height,
            width=self.width,
            sampling={name: getattr(self, name) for name in SETTINGS},
            preset=self.preset,
            batch_size=self.batch_size,
            window=self.window or (LOW_MEMORY_WINDOW if self.low_memory else None),
            save_stages=self.save_stages,
            changes=self.changes(),
        )

    def changes(self) -> Changes:
        """The picture to be changed, and how."""
        from cascade.drawing.changes import Changes

        if self.extend is not None and not isinstance(self.extend, dict):
            raise CascadeError("--extend: expected sides, such as left=64,top=32")
        return Changes(self.image, self.mask, self.strength, self.extend, self.resampling, self.variation)

    def _progress(self) -> Progress:
        from cascade.batch import Bar, JsonLog, Progress

        if self.log_json:
            return JsonLog()
        return Bar() if sys.stderr.isatty() and not self.quiet else Progress()

    def _total(self, output: Output) -> int | None:
        """Pictures of this process, about."""
        from cascade.prompts import count_prompts

        prompts = count_prompts(self.file) if self.file else len(self.prompts)
        if prompts is None:
            return None
        return -(-prompts * self.num_images_per_prompt // (self.shard[1] * output.team.count))

    def _finish(self, output: Output, summary: Summary, run_seed: int) -> int:
        """What comes once all is drawn; with several processes, the first does it for all."""
        output.team.wait_for_the_others()
        summary.stopped = summary.stopped or not output.is_everything_done(summary.last_unit)
        if output.team.rank > 0:
            return 0
        output.manifest.refresh()
        pictures, kept, failures = output.manifest.count(), output.kept(), output.failures()
        if not summary.stopped:
            output.complete()
        self._write_extras(output)
        if self.seed is None:
            self._say(f"seed: {run_seed}")
        before = f", {kept} of them from before" if kept else ""
        failed = f", {failures} failed" if failures else ""
        page = f"; see {output.path('index', '.html')}" if self.html else ""
        self._say(f"{pictures} picture{'s' * (pictures != 1)} in {self.out}{before}{failed}{page}")
        if summary.stopped:
            click.echo("cascade: stopped; the same command continues", err=True)
        if self.log_json:
            click.echo(_event("end", pictures=pictures, kept=kept, failures=failures, out=self.out))
        return 1 if failures or summary.stopped else 0

    def _write_extras(self, output: Output) -> None:
        from cascade.batch.report import write_grid, write_page, write_parquet

        entries = output.manifest.entries
        if output.manifest.count() == 0:
            return
        if self.grid:
            columns = self.num_images_per_prompt if self.num_images_per_prompt > 1 else None
            output.write_with("grid", ".png", lambda path: write_grid(entries(), output.read, path, columns))
        if self.manifest == "parquet":
            output.write_with("manifest", ".parquet", lambda path: write_parquet(entries(), path))
        if self.html:
            title = Path(self.out).resolve().name
            output.write_with("index", ".html", lambda path: write_page(entries(), path, title))

    def _say(self, line: str) -> None:
        if not self.quiet and not self.log_json:
            click.echo(line)


def _event(name: str, **values: Any) -> str:
    return json.dumps({"event": name, **values})


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether the system's word to stop came: then the pictures at hand are finished, and the run ends."""
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
