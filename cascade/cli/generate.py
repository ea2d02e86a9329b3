"""`cascade generate`: pictures from prompts, into a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cascade.errors import CascadeError
from cascade.sampling import PRESETS, number, per_stage, threshold_value, whole_number
from cascade.seeds import MAX_SEED, fresh_seed

if TYPE_CHECKING:
    from cascade.batch import DrawOptions, PictureFolder, Summary
    from cascade.pipeline import CascadePipeline

SAMPLING = ("steps", "guidance", "sampler", "aug_level", "threshold")
"""Options with one value for all stages or one for each."""


def _for_stages(name: str, convert: Callable[[str], Any], help: str) -> Callable[[Any], Any]:
    """An option that takes `20` for all stages, or `base=20,sr256=4`."""

    def read(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else per_stage(text, convert)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from None

    return click.option(name, callback=read, metavar="[STAGE=]VALUE,...", help=help)


_POSITIVE = click.IntRange(min=1)


@click.command()
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("--prompts", "file", metavar="FILE", help="Prompts: .txt (one a line), .jsonl, .csv, or `-`: one a line.")
@click.option("--model", metavar="MODEL", help="A folder or hub id; default: the bundled cascade.")
@click.option("--out", default="out", show_default=True, metavar="FOLDER", help="Where the pictures go.")
@click.option("--overwrite", is_flag=True, help="Write into a folder that holds pictures of an earlier run.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Same seed, same pictures; default: drawn and reported.")
@click.option("-n", "--num-images-per-prompt", type=_POSITIVE, default=1, show_default=True)
@click.option("--negative-prompt", metavar="TEXT", help="What the pictures should not be like.")
@_for_stages("--steps", whole_number, "Sampling steps, e.g. 20 or base=20,sr256=4.")
@_for_stages("--guidance", number, "Weight of the prompt, 1 = none.")
@_for_stages("--sampler", str, "ddpm, ddim, heun or dpm++.")
@_for_stages("--aug-level", number, "Noise on the smaller picture, 0 to 1.")
@_for_stages("--threshold", threshold_value, "A quantile such as 0.995, clip, or none.")
@click.option("--preset", type=click.Choice(PRESETS), help="Steps and samplers chosen for speed or quality.")
@click.option("--until", type=_POSITIVE, help="Stop after the stage of this size, in pixels.")
@click.option("--height", type=_POSITIVE, help="Of the pictures, in pixels.")
@click.option("--width", type=_POSITIVE, help="Of the pictures, in pixels.")
@click.option("--save-stages", is_flag=True, help="Keep the smaller pictures too, in FOLDER/stages.")
@click.option("--grid", is_flag=True, help="Also write a contact sheet, FOLDER/grid.png.")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one.")
@click.option("--dtype", help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU.")
@click.option("--batch-size", type=_POSITIVE, help="Pictures per network call; default: 1 on a CPU, 8 on a GPU.")
@click.option("--low-memory", is_flag=True, help="Hold one stage in memory at a time.")
@click.option("--quiet", is_flag=True, help="Say nothing but what failed.")
def generate(**values: Any) -> int:
    """Draw pictures.

    \b
    cascade generate "a red apple" "two blue stars" --seed 7
    cascade generate --prompts prompts.jsonl --out pictures
    """
    request = Request(**values)
    if bool(request.prompts) == bool(request.file):
        raise CascadeError("give either prompts or --prompts FILE")
    return request.run()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for; one field an option."""

    prompts: tuple[str, ...]
    file: str | None
    model: str | None
    out: str
    overwrite: bool
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
    grid: bool
    device: str | None
    dtype: str | None
    batch_size: int | None
    low_memory: bool
    quiet: bool

    def run(self) -> int:
        """Draw everything; the exit status."""
        from cascade.batch import PictureFolder, run_batch
        from cascade.prompts import given_prompts, read_prompts

        run_seed = fresh_seed() if self.seed is None else self.seed
        records = read_prompts(self.file, run_seed) if self.file else given_prompts(self.prompts, run_seed)
        with PictureFolder(self.out, overwrite=self.overwrite, save_stages=self.save_stages) as folder:
            pipeline = self._pipeline()
            summary = run_batch(
                pipeline, records, self._options(run_seed), folder, lambda failure: click.echo(failure, err=True)
            )
            self._finish(folder, summary, run_seed)
        return 1 if summary.failures else 0

    def _pipeline(self) -> CascadePipeline:
        from cascade.pipeline import CascadePipeline

        return CascadePipeline.from_pretrained(
            self.model, device=self.device, dtype=self.dtype, low_memory=self.low_memory
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
            sampling={name: getattr(self, name) for name in SAMPLING},
            preset=self.preset,
            batch_size=self.batch_size,
            window=LOW_MEMORY_WINDOW if self.low_memory else None,
            progress=sys.stderr.isatty() and not self.quiet,
        )

    def _finish(self, folder: PictureFolder, summary: Summary, run_seed: int) -> None:
        if self.grid:
            folder.write_grid(columns=self.num_images_per_prompt if self.num_images_per_prompt > 1 else None)
        if self.seed is None:
            self._say(f"seed: {run_seed}")
        failed = f", {summary.failures} failed" if summary.failures else ""
        self._say(f"{summary.pictures} picture{'s' * (summary.pictures != 1)} in {self.out}{failed}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            click.echo(line)
