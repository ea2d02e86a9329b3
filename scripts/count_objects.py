"""How many objects a base stage draws at other aspect ratios: the reader of drawn scenes counts them.

    python scripts/count_objects.py [MODEL] [--aspects 1,2,0.5] [--limit 24]

The prompts are those of the scenes suite that name one or two objects. A picture is right if it has as many objects as
its prompt, "more" if it has more: a network that was trained on squares alone tends to draw a subject twice in a wide
picture. Colours are read too, shapes are not: the reader sees the picture squeezed to a square.
"""

from __future__ import annotations

from collections import Counter

import click

from cascade import CascadePipeline
from cascade.data.buckets import bucket_sizes
from cascade.evaluation import scenes
from cascade.evaluation.report import prompt_seeds
from cascade.evaluation.scene_reader import read_scene

KINDS = ("single object", "two objects", "relation", "size")


def counted(pipeline: CascadePipeline, size: tuple[int, int], limit: int, seed: int) -> Counter[str]:
    """Number of pictures with the right number of objects, fewer and more, and with the right colours."""
    asked = [item for item in scenes.items(seed) if item.kind in KINDS][:limit]
    prompts = [item.prompt for item in asked]
    base = pipeline.slots[0].config.resolution
    height, width = size
    drawn = pipeline(prompts, seed=prompt_seeds(prompts, seed), until=base, height=height, width=width).images
    found: Counter[str] = Counter()
    for item, picture in zip(asked, drawn, strict=True):
        objects = read_scene(picture).objects
        difference = len(objects) - len(item.scene.objects)
        found["right" if not difference else "more" if difference > 0 else "fewer"] += 1
        found["colours"] += {one.colour for one in objects} == {one.colour for one in item.scene.objects}
    return found


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--aspects", default="1,2,0.5", help="Width / height.")
@click.option("--limit", default=24, help="Prompts.")
@click.option("--seed", default=0)
def main(model: str | None, aspects: str, limit: int, seed: int) -> None:
    """Print the table."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    sizes = bucket_sizes([float(aspect) for aspect in aspects.split(",")], pipeline.slots[0].config)
    click.echo(f"{pipeline.name}, seed {seed}, {limit} prompts\n")
    click.echo("| size | right number | fewer | more | right colours |\n| --- | --- | --- | --- | --- |")
    for size in sizes:
        found = counted(pipeline, size, limit, seed)
        cells = (f"{found[name] / limit:.0%}" for name in ("right", "fewer", "more", "colours"))
        click.echo(f"| {size[1]}x{size[0]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
