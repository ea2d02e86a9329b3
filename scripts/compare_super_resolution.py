"""Comparison of super-resolution stages with each other, bicubic and Lanczos on held-out pictures.

    python scripts/compare_super_resolution.py runs/residual/stage runs/paper/stage --data data/test-256.parquet \\
        --text-encoder text_encoder --steps 1,2,4,8,16 --aug-levels 0.05

A line for every stage, number of steps, noise level on the smaller picture and number of rounds of back-projection;
figures as docs/super-resolution.md defines them, means over the pictures. The smaller pictures are the truth's area
means, rounded to 8 bits, or those of --low-column (scripts/draw_low_pictures.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor

from cascade import Stage
from cascade.drawing.engine import Engine
from cascade.drawing.slots import StageSlot
from cascade.evaluation.super_resolution import AVERAGED, Pair, enlarged, measure, read_pairs, resized
from cascade.evaluation.tower import load_tower
from cascade.storage.pipeline import load_encoder
from cascade.storage.stage import load_stage


def drawn(
    engine: Engine, stage: Stage, pairs: Sequence[Pair], captions: Sequence[str], **changes: float
) -> list[Tensor]:
    """A stage's enlargements of the smaller pictures, rounded to 8 bits: float (1, 3, H, W) each.

    changes: of the stage's sampling settings.
    """
    settings, slot = stage.config.sampling.model_copy(update=changes), StageSlot.holding(stage)
    return [
        enlarged(engine, slot, settings, pair.low, caption, 0) for pair, caption in zip(pairs, captions, strict=True)
    ]


def numbers(text: str) -> list[float]:
    """`1,2,4` as numbers."""
    return [float(part) for part in text.split(",")]


@click.command()
@click.argument("stages", nargs=-1, required=True)
@click.option("--data", required=True, help="Parquet file of held-out pictures.")
@click.option("--text-encoder", required=True, help="Folder of the encoder that the stages were trained with.")
@click.option("--steps", default="1,2,4", show_default=True, callback=lambda _c, _p, text: numbers(text))
@click.option("--aug-levels", default="0.05", show_default=True, callback=lambda _c, _p, text: numbers(text))
@click.option("--consistency", default="0", show_default=True, callback=lambda _c, _p, text: numbers(text))
@click.option("--low-column", default=None, help="Column of smaller pictures of their own (draw_low_pictures.py).")
@click.option("--count", default=24, show_default=True, help="Pictures.")
def main(
    stages: tuple[str, ...],
    data: str,
    text_encoder: str,
    steps: list[float],
    aug_levels: list[float],
    consistency: list[float],
    low_column: str | None,
    count: int,
) -> None:
    """Print the table."""
    loaded = {path: load_stage(path) for path in stages}
    first = next(iter(loaded.values())).config
    assert first.low_resolution is not None, "a base stage enlarges nothing"
    pairs = read_pairs(Path(data), (first.resolution, first.low_resolution), count, 0, low_column)
    encoder, tower = load_encoder(text_encoder, map(Path, stages)), load_tower()
    engine, captions = Engine(encoder.encode, torch.device("cpu")), [pair.caption for pair in pairs]

    def line(name: str, pictures: Iterable[Tensor]) -> None:
        found = [measure(picture, pair, tower) for picture, pair in zip(pictures, pairs, strict=True)]
        means = [sum(each[key] for each in found) / len(found) for key in AVERAGED]
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)

    print(f"{len(pairs)} pictures of {data}\n\n| | " + " | ".join(AVERAGED) + " |")
    print("| --- |" + " ---: |" * len(AVERAGED))
    line("truth", (pair.truth for pair in pairs))
    for kind in ("bicubic", "lanczos"):
        line(kind, (resized(pair, kind) for pair in pairs))
    for path, stage in loaded.items():
        for number, level, rounds in product(steps, aug_levels, consistency):
            changes = {"steps": int(number), "aug_level": level, "consistency": int(rounds)}
            name = f"{path}, {number:g} steps, aug {level:g}, consistency {rounds:g}"
            line(name, drawn(engine, stage, pairs, captions, **changes))


if __name__ == "__main__":
    main()
