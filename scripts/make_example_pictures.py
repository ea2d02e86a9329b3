"""A folder of example pictures for training: drawn scenes as PNG, each with a .txt of its caption.

python scripts/make_example_pictures.py --out pictures --count 300
"""

from __future__ import annotations

import random
from pathlib import Path

import click

from cascade.data.scenes import describe, draw, random_scene


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--count", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--size", default=64, show_default=True, help="Height and width in pixels.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, count: int, size: int, seed: int) -> None:
    """Draw the pictures and write their captions."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        scene = random_scene(rng)
        draw(scene, size).save(out / f"{index:05d}.png")
        (out / f"{index:05d}.txt").write_text(describe(scene, rng) + "\n", encoding="utf-8")
    click.echo(f"{count} pictures in {out}")


if __name__ == "__main__":
    main()
