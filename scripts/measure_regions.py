"""Two objects in two regions, against the same in one prompt: how often shapes, colours and places are right.

    python scripts/measure_regions.py [MODEL] [--count 64] [--steps 16] [--guidance 3]

The prompts are those of the scenes suite that relate two objects (left of, right of, above, below). With regions each
object has half of the picture and a prompt of its own; the scenes reader reads both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import click
from PIL import Image

from cascade import CascadePipeline
from cascade.data.scenes import STYLE_WORDS, Relation, SceneObject, article
from cascade.evaluation import scenes
from cascade.evaluation.scene_reader import read_scene
from cascade.evaluation.scenes import Item

Box = tuple[float, float, float, float]
HALVES: dict[Relation, tuple[Box, Box]] = {
    "left of": ((0, 0, 0.5, 1), (0.5, 0, 1, 1)),
    "right of": ((0.5, 0, 1, 1), (0, 0, 0.5, 1)),
    "above": ((0, 0, 1, 0.5), (0, 0.5, 1, 1)),
    "below": ((0, 0.5, 1, 1), (0, 0, 1, 0.5)),
}
"""The halves of the first and of the second object."""


def regions_of(item: Item) -> list[tuple[Box, str]]:
    """Each object in its half."""
    assert item.scene.relation is not None
    pairs = zip(HALVES[item.scene.relation], item.scene.objects, strict=True)
    return [(box, f"{article(f'medium {_words(one)}')}, {STYLE_WORDS}") for box, one in pairs]


def _words(one: SceneObject) -> str:
    return f"{one.colour} {one.shape}"


def report(name: str, items: Sequence[Item], pictures: Sequence[Image.Image]) -> str:
    """A line: the share of right pictures, and what is wrong in the others."""
    judged = [scenes.judge(item, read_scene(picture)) for item, picture in zip(items, pictures, strict=True)]
    wrong = Counter[str]()
    for item, right in zip(items, judged, strict=True):
        if not right["all"]:
            wrong.update(_words(one) for one in item.scene.objects)
    shares = ", ".join(f"{key} {sum(one[key] for one in judged)}" for key in judged[0])
    often = ", ".join(f"{words} {count}" for words, count in wrong.most_common(6))
    return f"{name}: of {len(items)} right: {shares}\n    in the wrong ones: {often or 'nothing'}"


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--count", default=64, help="Pairs of objects.")
@click.option("--steps", type=int, help="Default: the model's.")
@click.option("--guidance", type=float, help="Default: the model's.")
@click.option("--seed", default=0)
@click.option("--regions-only", is_flag=True, help="Leave out the plain prompts.")
def main(
    model: str | None, count: int, steps: int | None, guidance: float | None, seed: int, regions_only: bool
) -> None:
    """Draw, read, and print a line for each way."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    base = pipeline.slots[0].config
    items = list(islice((item for item in scenes.items(seed) if item.kind == "relation"), count))
    seeds = [seed + number for number in range(len(items))]
    settings: dict[str, Any] = {"until": base.resolution, "steps": steps, "guidance": guidance}
    if not regions_only:
        plain = pipeline([item.prompt for item in items], seed=seeds, **settings).images
        click.echo(report("one prompt", items, plain))
    drawn = [
        pipeline(f"two shapes, {STYLE_WORDS}", regions=regions_of(item), seed=one, **settings).images[0]
        for item, one in zip(items, seeds, strict=True)
    ]
    click.echo(report("regions", items, drawn))


if __name__ == "__main__":
    main()
