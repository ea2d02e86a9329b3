"""`cascade generate`: draws pictures from prompts into a folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cascade.cli.terminal import path_option, say
from cascade.config.values import PRESETS, number, per_stage, threshold_value, whole_number
from cascade.errors import CascadeError, quoted
from cascade.seeds import MAX_SEED
from cascade.system import STOP_SIGNALS

if TYPE_CHECKING:
    from cascade.batch.reports import Progress
    from cascade.batch.request import BatchRequest, Outcome


def for_stages(
    name: str, convert: Callable[[str], Any], help: str, metavar: str = "[STAGE=]VALUE,..."
) -> Callable[[Any], Any]:
    """A click option with one value for all stages (`20`), or one per stage (`base=20,sr256=4`)."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else per_stage(text, convert)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from None

    return click.option(name, callback=read, metavar=metavar, help=help)


def _projection(text: str) -> dict[str, float]:
    """The section of `--projection 0.2`."""
    return {"parallel": number(text)}


_POSITIVE = click.IntRange(min=1)


def _batch_size(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        size = whole_number(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; expected a number of at least 1, or auto.") from None
    if size < 1:
        raise click.BadParameter(f"{size} is not in the range x>=1.")
    return size


def conditions_option(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """`age=41` of each --condition, by name."""
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not name or not value or name in values:
            raise click.BadParameter(f"{quoted(text)}; expected each condition once, as in age=41.")
        values[name] = value
    return values


def _weights(_context: click.Context, _parameter: click.Parameter, text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        found = per_stage(text, number)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"{quoted(text)}; expected conditions and weights, such as layout=2,text=5.")
    return found


def _shard(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, int]:
    if text is None:
        return (0, 1)
    which, _, count = text.partition("/")
    if which.isdecimal() and count.isdecimal() and 1 <= int(which) <= int(count):
        return (int(which) - 1, int(count))
    raise click.BadParameter(f"{quoted(text)}; expected number/count, such as 3/16.")


@click.command()
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@path_option("--prompts", "file", metavar="FILE", help="Prompts: .txt, .jsonl, .csv, .tsv, .parquet, a folder, or `-`.")
@click.option("--strict", is_flag=True, help="Stop at the first line that cannot be drawn.")
@path_option(
    "--from-image", metavar="FILE", help="Draw a picture again, to the same bytes, from the metadata inside it."
)
@path_option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade.")
@path_option(
    "--lora", multiple=True, metavar="[STAGE=]FOLDER[:SCALE]", help="A low-rank adapter to add, such as mascot:0.8."
)
@path_option("--out", default="out", show_default=True, metavar="FOLDER", help="Folder of the pictures.")
@click.option("--overwrite", is_flag=True, help="Remove the pictures of an earlier run in FOLDER and start again.")
@click.option(
    "--format",
    type=click.Choice(("png", "webp", "jpeg", "tiff", "npy", "webdataset")),
    help="Default: png, or tiff for pictures that png cannot hold.",
)
@click.option(
    "--background", type=click.Choice(("white", "checker", "none")), default="none", help="Behind transparency."
)
@click.option("--scale", type=_POSITIVE, metavar="N", help="With --nearest: each pixel becomes a square of this side.")
@click.option("--nearest", is_flag=True, help="Enlarge by --scale without smoothing, for pixel art.")
@path_option("--palette", metavar="N|FILE", help="Limit the colours: a number, or .hex, .gpl, .pal, or a picture.")
@click.option("--tar-size", type=_POSITIVE, default=1000, show_default=True, help="Prompts per webdataset shard.")
@click.option("--manifest", type=click.Choice(("jsonl", "parquet")), default="jsonl", help="Parquet: in addition.")
@click.option("--html", is_flag=True, help="Also write a page of pictures and prompts, FOLDER/index.html.")
@click.option("--shard", callback=_shard, metavar="I/N", help="Draw only part I of N, such as 3/16.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Same seed, same pictures; default: random.")
@click.option("-n", "--num-images-per-prompt", type=_POSITIVE, default=1, show_default=True)
@click.option("--negative-prompt", metavar="TEXT", help="Description of what to avoid.")
@for_stages("--steps", whole_number, "Sampling steps, e.g. 20 or base=20,sr256=4.")
@for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@for_stages("--guidance-rescale", number, "How far guidance's increase of contrast is undone, 0 to 1.")
@for_stages("--projection", _projection, "Guidance that does not saturate: factor on what would, such as 0.")
@for_stages("--sampler", str, "By name; docs/configuration.md lists them.")
@for_stages("--aug-level", number, "Noise on the smaller picture, 0 to 1.")
@for_stages("--threshold", threshold_value, "A quantile such as 0.995, clip, or none.")
@click.option("--preset", type=click.Choice(PRESETS), help="Steps and samplers chosen for speed or quality.")
@click.option("--until", type=_POSITIVE, help="Stop after the stage of this size, in pixels.")
@click.option("--height", type=_POSITIVE, help="Height of the pictures, in pixels.")
@click.option("--width", type=_POSITIVE, help="Width of the pictures, in pixels.")
@click.option("--save-stages", is_flag=True, help="Keep the smaller pictures too, in FOLDER/stages.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, FOLDER/grid.png.")
@path_option("--image", metavar="FILE", help="A picture to change, see docs/editing.md.")
@path_option("--mask", metavar="FILE", help="White where the picture is redrawn; elsewhere every bit stays.")
@for_stages("--strength", number, "0 returns the picture, 1 ignores it; default: 0.85, with a mask 1.")
@for_stages("--extend", whole_number, "Draw beyond the picture, in pixels, such as left=64,top=32.", "SIDE=PIXELS,...")
@click.option("--resampling", type=_POSITIVE, default=1, show_default=True, help="With a mask: rounds of each step.")
@click.option(
    "--known",
    type=click.Choice(("noised", "clean")),
    default="noised",
    show_default=True,
    help="With a mask: how the network sees what stays; clean: as DeepFloyd IF's own inpainting.",
)
@click.option(
    "--variation", nargs=2, type=(int, float), metavar="SEED SHARE", help="Mix in this share of another seed's noise."
)
@click.option(
    "--prompt-language", is_flag=True, help="Read (word:1.3), [from:to:0.4] and a AND b, see docs/editing.md."
)
@click.option(
    "--long-prompts",
    type=click.Choice(("cut", "chunk")),
    default="cut",
    show_default=True,
    help="A prompt beyond the encoder's limit: cut, or read in windows.",
)
@click.option(
    "--default-style", metavar="TEXT", help="Style words for prompts without any; none: not even the model's own."
)
@click.option(
    "--region", "regions", multiple=True, metavar="PLACE: PROMPT", help="A part's own prompt: 0,0,0.5,1: a red ring."
)
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    callback=conditions_option,
    metavar="NAME=VALUE",
    help="A condition of the model: age=41, layout=FILE, or none.",
)
@click.option(
    "--guidance-of",
    callback=_weights,
    metavar="NAME=WEIGHT,...",
    help="Guidance of single conditions: layout=2,text=5.",
)
@click.option("--prompt-sets", is_flag=True, help="Write out {red|green} car and __file__, one line of file.txt each.")
@path_option("--wildcards", default=".", metavar="FOLDER", help="Folder of the files of --prompt-sets.")
@click.option("--travel", nargs=2, metavar="PROMPT PROMPT", help="Frames from one prompt to another; travel.webp.")
@click.option("--travel-seed", type=click.IntRange(0, MAX_SEED), help="Frames from the noise of --seed to this seed's.")
@click.option(
    "--frames", type=click.IntRange(min=2), default=24, show_default=True, help="Frames of --travel and --travel-seed."
)
@click.option(
    "--matrix", multiple=True, metavar="SETTING=A,B,...", help="A sheet over one setting, or two; see docs/editing.md."
)
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option(
    "--dtype",
    help="float32, bfloat16, float16, or auto, the fastest; default: bfloat16 if the GPU supports it, else float32.",
)
@click.option("--batch-size", callback=_batch_size, metavar="N", help="Pictures per network call; auto: all that fit.")
@click.option("--low-memory", is_flag=True, help="Hold one stage in memory at a time, for a window of prompts.")
@click.option("--text-8bit", is_flag=True, help="Text encoder in 8 bits; needs the extra `quantized`.")
@click.option("--window", type=_POSITIVE, help="Prompts drawn together; default: a batch, 64 with --low-memory.")
@click.option("--log-json", is_flag=True, help="Print one line of JSON per event on stdout.")
@click.option("--quiet", is_flag=True, help="Print only failures.")
def generate(**values: Any) -> int:
    """Draw pictures.

    \b
    cascade generate "a red apple" "a fox" --seed 7
    cascade generate --prompts prompts.jsonl --out pictures
    """
    from cascade.batch.request import BatchRequest

    screen = Screen(values.pop("quiet"), values.pop("log_json"))
    picture = values.pop("from_image")
    request = BatchRequest(**values)
    if picture is None:
        return _drawn(request, screen)
    from cascade.cli.redraw import redraw

    if request.prompts or request.file:
        raise CascadeError("--from-image: the picture holds its own prompt; leave out prompts")
    return redraw(picture, request)


@dataclass(frozen=True)
class Screen:
    """The output of a run on the terminal."""

    quiet: bool
    log_json: bool

    def progress(self) -> Progress:
        """The progress display during the run."""
        from cascade.batch.reports import Bar, JsonLog, Progress

        if self.log_json:
            return JsonLog()
        return Bar() if sys.stderr.isatty() and not self.quiet else Progress()

    def end(self, outcome: Outcome, request: BatchRequest) -> None:
        """Print the outcome."""
        if request.seed is None:
            self._say(f"seed: {outcome.seed}")
        before = f", {outcome.kept} of them from an earlier run" if outcome.kept else ""
        failed = f", {outcome.failures} failed" if outcome.failures else ""
        page = f"; see {outcome.folder / 'index.html'}" if request.html and request.shard[1] == 1 else ""
        plural = "s" * (outcome.pictures != 1)
        self._say(f"{outcome.pictures} picture{plural} in {request.out}{before}{failed}{page}")
        if outcome.stopped:
            say("cascade: stopped; the same command continues", error=True)
        if self.log_json:
            counts = {name: getattr(outcome, name) for name in ("pictures", "kept", "failures")}
            say(json.dumps({"event": "end", **counts, "out": request.out}))

    def _say(self, line: str) -> None:
        if not self.quiet and not self.log_json:
            say(line)


def _drawn(request: BatchRequest, screen: Screen) -> int:
    """Draw everything; returns the exit status."""
    with _stopping_on_signals() as stop:
        outcome = request.run(screen.progress(), stop)
    if not outcome.speaks:
        return 0
    screen.end(outcome, request)
    return 1 if outcome.failures or outcome.stopped else 0


@contextmanager
def _stopping_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function: whether a stop signal has arrived; the run then finishes its current pictures and ends."""
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
