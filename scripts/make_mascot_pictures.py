"""Ten captioned pictures of an invented creature, for fine-tuning a model on something unknown to it.

python scripts/make_mascot_pictures.py --out subject

A mimble is an egg of teal fur with one large eye, two orange horns and orange feet. It was invented here, so no third
party has rights in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image, ImageDraw

SIZE, FACTOR = 256, 4
TEAL, DARK, ORANGE, WHITE, BLACK, RED, YELLOW = (
    (38, 166, 154),
    (0, 105, 92),
    (251, 140, 0),
    (255, 255, 255),
    (33, 33, 33),
    (229, 57, 53),
    (253, 216, 53),
)


@dataclass(frozen=True)
class Mimble:
    """Pose of a mimble. x, y: its middle; size: half its width, all in the unit square. gaze: -1 left, 1 right."""

    caption: str
    x: float = 0.5
    y: float = 0.52
    size: float = 0.27
    gaze: float = 0.0
    asleep: bool = False
    waves: bool = False
    hat: bool = False
    ball: bool = False


MIMBLES = (
    Mimble("a mimble"),
    Mimble("a mimble looking left", gaze=-1),
    Mimble("a mimble looking right", gaze=1),
    Mimble("a sleeping mimble", asleep=True),
    Mimble("a waving mimble", waves=True),
    Mimble("a mimble with a red hat", hat=True),
    Mimble("a mimble with a yellow ball", ball=True),
    Mimble("a small mimble", size=0.17, y=0.6),
    Mimble("a large mimble", size=0.33, y=0.5),
    Mimble("a waving mimble with a red hat", waves=True, hat=True, gaze=-1),
)


def draw(mimble: Mimble) -> Image.Image:
    """RGB on white, antialiased: drawn larger, then area-averaged."""
    canvas = Image.new("RGB", (SIZE * FACTOR, SIZE * FACTOR), WHITE)
    pen = ImageDraw.Draw(canvas)

    def at(x: float, y: float) -> tuple[float, float]:
        """From the creature's own coordinates, in which it is 2 wide, to the canvas."""
        scale = SIZE * FACTOR
        return (mimble.x + mimble.size * x) * scale, (mimble.y + mimble.size * y) * scale

    def ellipse(x: float, y: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        pen.ellipse([at(x - width, y - height), at(x + width, y + height)], fill=colour)

    for side in (-1, 1):
        pen.polygon([at(0.35 * side, -0.9), at(0.75 * side, -0.6), at(0.8 * side, -1.45)], fill=ORANGE)
        ellipse(0.4 * side, 1.2, 0.3, 0.14, ORANGE)
    raised = -0.75 if mimble.waves else 0.5
    pen.line([at(0.8, 0.1), at(1.25, raised)], fill=DARK, width=int(0.2 * mimble.size * SIZE * FACTOR))
    pen.line([at(-0.8, 0.1), at(-1.2, 0.5)], fill=DARK, width=int(0.2 * mimble.size * SIZE * FACTOR))
    ellipse(0, 0, 1, 1.2, TEAL)
    ellipse(0, 0.55, 0.6, 0.5, DARK)
    if mimble.asleep:
        pen.arc([at(-0.45, -0.6), at(0.45, 0.1)], 20, 160, fill=BLACK, width=int(0.1 * mimble.size * SIZE * FACTOR))
    else:
        ellipse(0, -0.3, 0.5, 0.5, WHITE)
        ellipse(0.22 * mimble.gaze, -0.3, 0.24, 0.24, BLACK)
    if mimble.hat:
        pen.polygon([at(-0.5, -1.0), at(0.5, -1.0), at(0, -1.85)], fill=RED)
    if mimble.ball:
        ellipse(1.35, 0.95, 0.35, 0.35, YELLOW)
    return canvas.reduce(FACTOR)


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
def main(out: Path) -> None:
    """Draw the pictures and write their captions."""
    out.mkdir(parents=True, exist_ok=True)
    for index, mimble in enumerate(MIMBLES):
        draw(mimble).save(out / f"{index}.png")
        (out / f"{index}.txt").write_text(f"{mimble.caption}\n{mimble.caption}, mimble style\n", encoding="utf-8")
    click.echo(f"{len(MIMBLES)} pictures in {out}")


if __name__ == "__main__":
    main()
