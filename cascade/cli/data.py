"""`cascade check-data`: what a training run will see, before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascade.cli.train import find_config

if TYPE_CHECKING:
    from cascade.config import StageConfig
    from cascade.data.survey import Survey
    from cascade.text.tokens import TokenCounter

_NAMED = 5  # problems and copies that are written out


@click.command("check-data")
@click.argument("config")
@click.argument("assignments", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--limit", type=click.IntRange(min=1), help="Records to look at, spread evenly; default: all of them.")
@click.option("--sheet", type=click.Path(dir_okay=False), default="check-data.png", show_default=True)
@click.option("--views", type=click.IntRange(min=1), default=24, show_default=True, help="Pictures on the sheet.")
def check_data(config: str, assignments: tuple[str, ...], limit: int | None, sheet: str, views: int) -> int:
    """Look at the data of a training run: counts, sizes, broken files, caption lengths, copies.

    Draws a sheet of the first views as the network will see them, for super-resolution beside the smaller pictures.
    Of scenes and streams the first 1000 records are looked at. Exit status 1: there are bad records, named.
    """
    from cascade.checkpoint import atomic_file
    from cascade.data.survey import survey, view_sheet
    from cascade.load import load_train_config, text_encoder_source
    from cascade.text.tokens import TokenCounter

    settings = load_train_config(find_config(config), assignments)
    # First, because a wrong encoder should be told before a million pictures are decoded.
    counter = TokenCounter(text_encoder_source(settings.text), settings.text.captions)
    surveys = [survey(source, settings.stage, limit, settings.data.workers) for source in settings.data.sources]
    for found in surveys:
        click.echo("\n".join(describe(found, settings.stage)))
    click.echo(caption_lengths(surveys, counter, settings.text.max_length))
    picture = view_sheet(settings.data, settings.stage, settings.training.seed, views)
    with atomic_file(Path(sheet)) as temporary:
        picture.save(temporary, format="PNG")
    click.echo(f"the first {views} views: {sheet}")
    return 1 if any(found.problems for found in surveys) else 0


def describe(found: Survey, stage: StageConfig) -> list[str]:
    """What was found, in lines."""
    total = f"{found.total:,} records" if found.total is not None else "no known end"
    lines = [f"{found.name}: {total}, {found.looked_at:,} looked at"]
    if found.sizes:
        by_area = sorted(found.sizes, key=lambda size: size[0] * size[1])
        least, median, most = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        small = sum(min(size) < stage.resolution for size in found.sizes)
        enlarged = f"; {small:,} with a side below {stage.resolution} px" if small else ""
        lines.append(f"  pictures: {least} to {most}, median {median}{enlarged}")
    lines += _some("bad", found.problems)
    lines += _some("copies", [f"{copy} = {first}" for copy, first in found.copies])
    repeated = sum(count > 1 for count in found.captions.values())
    lines.append(f"  captions: {len(found.captions):,} distinct, {repeated:,} of them used more than once")
    return lines


def caption_lengths(surveys: Iterable[Survey], counter: TokenCounter, longest: int) -> str:
    """How many tokens the captions have, and how many of them an encoder that keeps `longest` would cut."""
    captions = list({caption for found in surveys for caption in found.captions})
    lengths = sorted(counter.count(captions))
    if not lengths:
        return "captions: none"
    cut = sum(length > longest for length in lengths)
    return (
        f"captions: {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]};"
        f" {cut:,} of {len(lengths):,} are longer than text.max_length {longest} and would be cut"
    )


def _some(what: str, lines: Sequence[str]) -> list[str]:
    """`what`: how many, and the first few."""
    named = [f"    {line}" for line in lines[:_NAMED]]
    more = [f"    and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else []
    return [f"  {what}: {len(lines):,}", *named, *more]
