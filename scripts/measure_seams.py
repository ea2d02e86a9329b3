"""How visible the edge of a mask is in an inpainted picture, against a picture that is pasted into the hole.

    python scripts/measure_seams.py [MODEL] [--pictures 8]

The seam is the mean difference of neighbouring pixels on both sides of the mask's edge, divided by the mean of the same
lines moved by 1 to 4 pixels to either side, inside and outside the hole: 1 where the edge is like any other line of the
picture. The hole covers the middle of a drawn picture; "pasted" fills it with another picture of the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cascade import CascadePipeline

Pixels = NDArray[Any]
PROMPTS = ("a yellow taxi, noto style", "a red apple, noto style", "a house, twemoji style", "a cat, fluent flat style")
REACH = 4
"""Pixels around the edge whose lines are compared with it."""
WAYS: dict[str, dict[str, Any]] = {
    "one round": {},
    "4 rounds of resampling": {"resampling": 4},
    "known pixels clean": {"known": "clean"},
}


def seam(pictures: Sequence[Pixels], mask: Pixels) -> float:
    """See above. pictures: (H, W, 3) uint8. mask: (H, W) bool, True where they were redrawn."""
    edges, near = list[Pixels](), list[Pixels]()
    for picture in pictures:
        for turned, hole in ((picture, mask), (picture.swapaxes(0, 1), mask.T)):
            step = np.abs(np.diff(turned.astype(float), axis=1)).mean(axis=2)
            edge = hole[:, 1:] != hole[:, :-1]
            edges.append(step[edge])
            rows, columns = np.nonzero(edge)
            for shift in (*range(-REACH, 0), *range(1, REACH + 1)):
                moved = columns + shift
                inside = (moved >= 0) & (moved < step.shape[1])
                near.append(step[rows[inside], moved[inside]])
    return float(np.concatenate(edges).mean() / max(np.concatenate(near).mean(), 1e-9))


def hole_of(side: int) -> Pixels:
    """A square in the middle, half as wide as the picture."""
    mask = np.zeros((side, side), dtype=bool)
    mask[side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = True
    return mask


def measured(pipeline: CascadePipeline, count: int) -> dict[str, float]:
    """The seam of each way, of the untouched pictures, and of a paste, over `count` pictures of the base stage."""
    side = pipeline.slots[0].config.resolution
    prompts, mask = [PROMPTS[number % len(PROMPTS)] for number in range(count)], hole_of(side)
    drawn = {
        start: pipeline(prompts, seed=[start + n for n in range(count)], until=side, output_type="np").images
        for start in (0, 1000)
    }
    found = {"untouched": seam(drawn[0], mask)}
    for name, how in WAYS.items():
        changed = [
            pipeline(prompt, image=image, mask=mask, seed=2000 + n, until=side, output_type="np", **how).images[0]
            for n, (prompt, image) in enumerate(zip(prompts, drawn[0], strict=True))
        ]
        found[name] = seam(changed, mask)
    found["pasted"] = seam([np.where(mask[..., None], b, a) for a, b in zip(*drawn.values(), strict=True)], mask)
    return found


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--pictures", default=8)
def main(model: str | None, pictures: int) -> None:
    """Print the table."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    click.echo(f"{pipeline.name}, {pictures} pictures\n\n| hole | seam |\n| --- | --- |")
    for name, value in measured(pipeline, pictures).items():
        click.echo(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
