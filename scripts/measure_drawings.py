"""Measures of appearance for pictures that are already drawn.

    python scripts/measure_drawings.py prompts --data prepared --limit 96 --out prompts.jsonl
    cascade generate --model MODEL --prompts prompts.jsonl --out drawn --save-stages
    python scripts/measure_drawings.py measure drawn --data prepared

The prompts are those of `cascade evaluate --suite art`, with its seeds; the `id` of each is that of the true picture
that it describes. `measure` reads the folder's manifest.jsonl (`id`, `file` and, if saved, `stages`) and prints the
figures of docs/evaluation.md, "Appearance", at every size with both drawings and true pictures. Pictures by other
programs can be measured too, with a manifest that has `id` and `file`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import CascadeError
from cascade.evaluation import art_look
from cascade.evaluation.art import choose
from cascade.evaluation.art_data import read_art, shelf
from cascade.evaluation.report import Figure, prompt_seeds, shown
from cascade.evaluation.tower import load_tower
from cascade.files.atomic import write_text
from cascade.pictures.images import from_pil

DATA = click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)


def asked_for(data: Path, seed: int, limit: int | None, further: int) -> list[art_look.Asked]:
    """The prompts of the art suite: unseen and training subjects alternately, then further styles."""
    unseen, seen = choose(read_art(data, "train"), read_art(data, "validation", "test"), seed, limit)
    turns = [item for pair in zip_longest(unseen, seen) for item in pair if item is not None]
    asked = [art_look.Asked(item.prompt, item.style, f"{item.style}-{item.concept.key}") for item in turns]
    return [*asked, *(art_look.further(data, further, seed) if further else [])]


def lines(asked: Sequence[art_look.Asked], seed: int) -> list[dict[str, Any]]:
    """The prompts as lines of a prompt file."""
    seeds = prompt_seeds([one.prompt for one in asked], seed)
    return [{"id": one.id, "prompt": one.prompt, "seed": own} for one, own in zip(asked, seeds, strict=True)]


def drawings(folder: Path) -> dict[int, dict[str, Path]]:
    """The files of a folder by size, then by the id of the true picture. Raises CascadeError without a manifest."""
    manifests = sorted(folder.glob("manifest*.jsonl"))
    if not manifests:
        raise CascadeError(f"{folder}: no manifest.jsonl; draw with `cascade generate --prompts FILE --out {folder}`")
    found: dict[int, dict[str, Path]] = {}
    for line in (line for path in manifests for line in path.read_text().splitlines() if line.strip()):
        entry = json.loads(line)
        for name in {entry["file"], *entry.get("stages", {}).values()}:
            with Image.open(folder / name) as picture:
                found.setdefault(min(picture.size), {}).setdefault(entry["id"], folder / name)
    return dict(sorted(found.items()))


def read(paths: Sequence[Path]) -> Tensor:
    """uint8 (N, 3, S, S)."""
    return torch.stack([from_pil(Image.open(path)) for path in paths])


def measure_folder(folder: Path, data: Path, seed: int) -> list[Figure]:
    """The figures at every size, of the drawings whose id is one of the data's."""
    tower, figures = load_tower(), []
    for size, files in drawings(folder).items():
        entries = shelf(data, size).entries
        known = [name for name in files if name in entries]
        asked = [art_look.Asked(entries[name].prompt, entries[name].style, name) for name in known]
        if asked:
            figures += art_look.figures(asked, read([files[name] for name in known]), data, tower, seed)
    if not figures:
        raise CascadeError(f"{folder}: no drawing has the id of a true picture of its size in {data}")
    return figures


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure the appearance of pictures that are already drawn."""


@main.command()
@DATA
@click.option("--limit", type=click.IntRange(min=1), help="Prompts at most, half of them of unseen subjects.")
@click.option("--further", type=click.IntRange(min=0), default=0, help="Prompts for each further style.")
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("prompts.jsonl"))
def prompts(data: Path, limit: int | None, further: int, seed: int, out: Path) -> None:
    """Write the prompts of the art suite as a prompt file."""
    made = lines(asked_for(data, seed, limit, further), seed)
    write_text(out, "".join(f"{json.dumps(line)}\n" for line in made))
    click.echo(f"{len(made)} prompts in {out}")


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@DATA
@click.option("--seed", default=0, help="Of the choice of true pictures and patches.")
def measure(folder: Path, data: Path, seed: int) -> None:
    """Print the figures of a folder of drawings."""
    try:
        figures = measure_folder(folder, data, seed)
    except CascadeError as error:
        raise click.ClickException(str(error)) from None
    click.echo("| figure | measured | true pictures | unit | better | over |\n| --- | ---: | ---: | --- | --- | ---: |")
    for figure in figures:
        reference = "" if figure.reference is None else shown(figure.reference, figure.unit)
        value = shown(figure.value, figure.unit)
        click.echo(f"| {figure.name} | {value} | {reference} | {figure.unit} | {figure.better} | {figure.count} |")


if __name__ == "__main__":
    main()
