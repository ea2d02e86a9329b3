"""`cascade train` and `cascade encode`: a training run of one stage, and the text embeddings for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascade.allocator import keep_freed_memory
from cascade.cli.paths import path_argument
from cascade.cli.say import say
from cascade.errors import CascadeError

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
    from cascade.load.training import load_train_config, load_trainer
    from cascade.training.state import checkpoints

    keep_freed_memory()
    settings = load_train_config(find_config(config), assignments)
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

    from cascade.batch.locks import processes
    from cascade.device import choose_device
    from cascade.load.training import encoder_settings, load_plain_text_encoder, load_train_config, open_cache
    from cascade.text.cached import Pace, fill
    from cascade.training.interrupt import stop_signals

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
