"""`cascade make`, `train`, `encode` and `plot`: from pictures to a cascade, or one training run and its curves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascade.cli.terminal import path_argument, path_option, say
from cascade.errors import CascadeError
from cascade.system.process import keep_freed_memory

if TYPE_CHECKING:
    from cascade.config.training import TrainConfig


PRESET = "preset:"
_PACKAGE = Path(__file__).parents[1]
PRESET_FOLDERS = (_PACKAGE / "presets", _PACKAGE.parent / "configs")
"""Folders of presets: in an installed package, or in a checkout of the sources."""
_LAUNCHER = "accelerate"
"""A folder next to the presets with launcher configurations, which are not training runs."""


@click.command()
@path_argument("config")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint.")
def train(config: str, assignments: tuple[str, ...], resume: bool) -> int:
    """Train one stage.

    CONFIG is a YAML file, or a preset such as preset:tiny/base; KEY=VALUE changes a setting of it.

    \b
    cascade train preset:tiny/base training.steps=200 output=runs/mine
    accelerate launch -m cascade train configs/small/base.yaml --resume
    """
    from cascade.storage.training import load_train_config, load_trainer
    from cascade.training.state import check_begun, checkpoints

    keep_freed_memory()
    settings = load_train_config(find_config(config), assignments)
    if resume:
        check_begun(Path(settings.output))  # before anything is loaded, or drawn for `training.prior`
    trainer = load_trainer(settings)
    finished = trainer.run(resume)
    if trainer.accelerator.is_main_process:
        if finished:
            say(f"stage {settings.stage.name} is trained: {trainer.output / 'stage'}")
        else:
            step = int(checkpoints(trainer.output)[-1].name.removeprefix("step-"))
            say(f"cascade: stopped after step {step}; continue with --resume", error=True)
    return 0 if finished else 1


@click.command()
@path_argument("config")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Captions at a time.")
@click.option("--device", help="cpu, cuda, ...; default: the GPU if there is one.")
def encode(config: str, assignments: tuple[str, ...], batch_size: int, device: str | None) -> int:
    """Fill the cache of text embeddings of a training run.

    Encodes its sample prompts and every caption of its sources, held-out ones included; a stream is read once from end
    to end. Captions of drawn scenes are encoded during training. Stopped by Ctrl-C or SIGTERM and started again, it
    continues. Under `accelerate launch` or `torchrun` the processes share the captions.
    """
    from tqdm import tqdm

    from cascade.batch.team import processes
    from cascade.storage.training import encoder_settings, load_plain_text_encoder, load_train_config, open_cache
    from cascade.system.device import choose_device
    from cascade.system.process import stop_signals
    from cascade.text.cached import Pace, fill

    path = find_config(config)
    settings = load_train_config(path, assignments)
    if settings.text.cache is None:
        raise CascadeError(f"{path}: text.cache is not set; name a folder with text.cache=FOLDER")
    number, count, _ = processes()
    encoder = load_plain_text_encoder(settings.text).to(choose_device(device))
    cache = open_cache(settings.text.cache, encoder)
    cache.note_settings(encoder_settings(settings.text))
    bar = sys.stderr.isatty() and number == 0
    with stop_signals() as stopped:
        captions = _captions(settings)
        shown = tqdm(captions, desc="captions", unit="caption", disable=not bar)
        added = fill(cache, encoder, shown, Pace(batch_size, stopped=stopped), share=(number, count))
    cache = open_cache(settings.text.cache, encoder)  # includes the embeddings of the other processes
    prefix = f"process {number}: " if count > 1 else ""
    say(
        f"{prefix}{added} captions encoded, {len(cache)} in {settings.text.cache},"
        f" {cache.bytes_per_caption:.0f} bytes each"
    )
    if stopped():
        say("cascade: stopped; the same command continues", error=True)
    return 1 if stopped() else 0


def _captions(config: TrainConfig) -> Iterator[str]:
    """All texts that the run will encode, so that it does not load the encoder for its first validation or grid."""
    from cascade.data.loader import captions_of

    validation = config.training.validation
    sources = (*config.data.sources, *(validation.sources if validation else ()))
    return chain(config.training.sample_prompts, captions_of(sources, config.stage.pictures))


def find_config(name: str) -> Path:
    """The YAML file of a training run: a path, or a preset. Raises CascadeError with the known presets."""
    if not name.startswith(PRESET):
        return Path(name)
    wanted = name.removeprefix(PRESET)
    presets = known_presets()
    if wanted not in presets:
        raise CascadeError(f"{name}: no such preset; expected one of {', '.join(sorted(presets))}")
    return presets[wanted]


def known_presets() -> dict[str, Path]:
    """The presets by name, `folder/stage`, from the first folder that has any."""
    for folder in PRESET_FOLDERS:
        paths = [path for path in folder.glob("*/*.yaml") if path.parent.name != _LAUNCHER]
        files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
        if files:
            return files
    return {}


# --- make ------------------------------------------------------------------------------------------------------------
# `cascade make`: from a folder of pictures to a cascade.

DEFAULT_HOURS = 10.0


@click.command()
@path_argument("pictures")
@path_option("--out", required=True, metavar="FOLDER", help="Folder for the settings, the runs and the model.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=DEFAULT_HOURS, show_default=True)
@path_option("--from", "start", metavar="MODEL", help="Start from a model's weights: bundled, a folder or a hub id.")
@click.option("--whole", is_flag=True, help="With --from: train all weights, not a low-rank adapter.")
@click.option(
    "--keep",
    multiple=True,
    metavar="PROMPT",
    help="With --from: what must not be forgotten, with {a|b}, or none; default: for bundled, shapes and small art.",
)
@click.option("--name", help="Name of the cascade; default: that of the folder.")
@click.option("--license", default="unstated", show_default=True, help="Licence of the weights, such as CC-BY-4.0.")
@click.option("--plan", is_flag=True, help="Look, measure and write the YAML files, then stop.")
def make(
    pictures: str,
    out: str,
    hours: float,
    start: str | None,
    whole: bool,
    keep: tuple[str, ...],
    name: str | None,
    license: str,
    plan: bool,
) -> int:
    """Make a cascade from a folder of pictures with captions.

    Looks at the pictures, chooses stages that this machine can train in --hours, measures their speed, prints time,
    memory and disk, trains, chooses steps and guidance on held-out pictures, and writes FOLDER/model with a card. Each
    stage has a YAML file in FOLDER, which may be edited. Stopped, the same command continues.

    \b
    cascade make pictures --out my-cascade --hours 2
    cascade make pictures --out my-cascade --hours 1 --from bundled
    """
    from cascade.making.make import KEPT, Order
    from cascade.making.make import make as make_cascade

    if start is None and (whole or keep):
        raise CascadeError(f"{'--whole' if whole else '--keep'}: needs the weights of a model; add --from MODEL")
    if start == "bundled" and not keep:
        keep = KEPT
    elif keep == ("none",):
        keep = ()
    keep_freed_memory()
    folder = Path(out)
    licensed = (name or folder.name, license)
    order = Order(Path(pictures), folder, hours, *licensed, start, whole, keep, lambda text: say(text))
    finished = make_cascade(order, plan_only=plan)
    if not finished:
        say("cascade: stopped; the same command continues", error=True)
    elif plan:
        say(f"the settings are in {folder}; the same command without --plan trains")
    return 0 if finished else 1


# --- plot ------------------------------------------------------------------------------------------------------------
# `cascade plot`: draws the curves of training runs.

_PROGRAM = "cascade plot"


@click.command()
@path_argument("runs", nargs=-1, required=True)
@path_option("--out", default="curves.png", show_default=True)
def plot(runs: tuple[str, ...], out: str) -> int:
    """Draw the logs of runs: loss, loss by noise level, learning rate, gradient norm, pictures per second.

    RUNS are folders of training runs; each is a line in every panel. Needs no server and no display.

    \b
    cascade plot runs/base
    cascade plot runs/wide runs/deep --out both.png
    """
    from cascade.files.atomic import atomic_file
    from cascade.pictures.reading import SOFTWARE, check_png
    from cascade.training.watch import draw_curves, read_curves

    check_png(Path(out), _PROGRAM)
    figure = draw_curves({run: read_curves(Path(run)) for run in runs})
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={SOFTWARE: _PROGRAM})
    say(f"{len(runs)} runs: {out}" if len(runs) > 1 else out)
    return 0
