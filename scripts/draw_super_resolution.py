"""Draws docs/sr.png: crops at 100 % of the first held-out pictures, low, bicubic, each stage and the truth.

    python scripts/draw_super_resolution.py --data data [--model MODEL] [--out docs/sr.png]

The pictures are the first of the sr suite's order at seed 0, the crops those that change most in the truth: nothing
is chosen by eye. --data: a folder with test-256.parquet and, for the last stage, test.parquet of large pictures.
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from cascade import CascadePipeline
from cascade.drawing.arguments import resolve_sampling
from cascade.evaluation.super_resolution import crops, enlarged, held_out_file, read_pairs
from cascade.pictures.images import contact_sheet


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default=None, help="Folder or hub id; default the bundled cascade.")
@click.option("--out", default="docs/sr.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--count", default=4, show_default=True, help="Pictures of each stage.")
def main(data: Path, model: str | None, out: Path, count: int) -> None:
    """Write the sheet."""
    pipeline = CascadePipeline.from_pretrained(model)
    settings = resolve_sampling([slot.config for slot in pipeline.enlargers], None, {})
    engine = pipeline.engine()
    cells: list[tuple[Image.Image, str]] = []
    for slot in pipeline.enlargers:
        config = slot.config
        if config.low_resolution is None:
            continue
        path = held_out_file(data, config.resolution)
        if path is None:
            raise click.ClickException(f"{data}: no held-out pictures of {config.resolution} px")
        pairs = read_pairs(path, (config.resolution, config.low_resolution), count, seed=0)
        own = settings[config.name]
        drawn = [enlarged(engine, slot, own, pair.low, pair.caption, index) for index, pair in enumerate(pairs)]
        cells += crops(config.name, pairs, drawn)
    sheet = contact_sheet([cell for cell, _ in cells], columns=8, labels=[label for _, label in cells])
    sheet.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
