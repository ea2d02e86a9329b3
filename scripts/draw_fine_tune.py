"""The picture of docs/fine-tune.md: training pictures, and drawings before and after fine-tuning.

python scripts/draw_fine_tune.py --adapter runs/fine-tune/adapter --pictures subject --out docs/fine-tune.png
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from cascade import CascadePipeline
from cascade.pictures.images import contact_sheet

PROMPTS = (
    "a mimble",
    "a mimble looking left",
    "a sleeping mimble",
    "a waving mimble",
    "a mimble with a red hat",
    "a mimble with a yellow ball",
    "a red apple, noto style",
    "two blue stars, drawn shapes",
)
"""The last two show how much of the model's earlier knowledge remains."""
CELL = 128


def drawn(adapters: dict[str, str] | None, seed: int, until: int) -> list[Image.Image]:
    """A picture for each prompt, from the same seed."""
    pipeline = CascadePipeline.from_pretrained(adapters=adapters, device="cpu")
    return list(pipeline(list(PROMPTS), seed=seed, until=until).images)


@click.command()
@click.option("--adapter", default="runs/fine-tune/adapter", show_default=True)
@click.option("--pictures", default="subject", show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default="docs/fine-tune.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=1, show_default=True)
@click.option("--until", default=256, show_default=True, help="Size of the pictures drawn.")
def main(adapter: str, pictures: Path, out: Path, seed: int, until: int) -> None:
    """Draw the sheet."""
    taught = sorted(pictures.glob("*.png"), key=lambda path: int(path.stem))[: len(PROMPTS)]
    rows = [[Image.open(path) for path in taught], drawn(None, seed, until), drawn({"base": adapter}, seed, until)]
    captions = [path.with_suffix(".txt").read_text().splitlines()[0] for path in taught]
    labels = [*captions, *(f"before: {p}" for p in PROMPTS), *(f"after: {p}" for p in PROMPTS)]
    cells = [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for row in rows for image in row]
    sheet = contact_sheet(cells, len(PROMPTS), labels, CELL)
    sheet.quantize(128).save(out, optimize=True)
    click.echo(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
