"""Draws the contact sheet of the model card: fixed prompts, seed 0, half of them unseen in training, no selection.

    python scripts/draw_model_card.py [--model MODEL] [--out docs/bundled.png]

The prompts were fixed before the first picture was drawn. The unseen subjects are in no training picture of any
style (the splits are by subject), and the last unseen pair of shape and colour is in none either.
"""

from __future__ import annotations

from pathlib import Path

import click

from cascade import CascadePipeline
from cascade.pictures.images import contact_sheet

SEEN = (
    "red apple, noto style",
    "blue heart, twemoji style",
    "dog face, fluent color style",
    "pizza, noto style",
    "grinning face, fluent 3d style",
    "house, twemoji style",
    "cat, fluent mono style",
    "flag of Japan, noto style",
    "a blue circle, drawn shapes",
)
UNSEEN = (
    "lemon, noto style",
    "light blue heart, twemoji style",
    "bear, fluent color style",
    "light bulb, fluent flat style",
    "loudly crying face, fluent 3d style",
    "rocket, twemoji style",
    "eye, fluent mono style",
    "flag of Denmark, noto style",
    "a blue star, drawn shapes",
)


@click.command()
@click.option("--model", default=None, help="Folder or hub id; default the bundled cascade.")
@click.option("--out", default="docs/bundled.png", show_default=True, type=click.Path(path_type=Path))
@click.option("--cell", default=256, show_default=True, help="Pixels of a picture on the sheet.")
def main(model: str | None, out: Path, cell: int) -> None:
    """Draw the sheet; the subjects of the first half were seen in training, those of the second were not."""
    prompts = [*SEEN, *UNSEEN]
    result = CascadePipeline.from_pretrained(model)(prompts, seed=0, progress=True)
    labels = [f"{'seen' if prompt in SEEN else 'unseen'}: {prompt}" for prompt in prompts]
    contact_sheet(result.images, columns=6, labels=labels, cell=cell).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
