"""`cascade make`: from a folder of pictures to a cascade."""

from __future__ import annotations

from pathlib import Path

import click

from cascade.allocator import keep_freed_memory
from cascade.cli.paths import path_argument, path_option
from cascade.cli.say import say

DEFAULT_HOURS = 10.0


@click.command()
@path_argument("pictures")
@path_option("--out", required=True, metavar="FOLDER", help="Folder for the settings, the runs and the model.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=DEFAULT_HOURS, show_default=True)
@path_option("--from", "start", metavar="MODEL", help="Start from a model's weights: bundled, a folder or a hub id.")
@click.option("--whole", is_flag=True, help="With --from: train all weights, not a low-rank adapter.")
@click.option("--name", help="Name of the cascade; default: that of the folder.")
@click.option("--license", default="unstated", show_default=True, help="Licence of the weights, such as CC-BY-4.0.")
@click.option("--plan", is_flag=True, help="Look, measure and write the YAML files, then stop.")
def make(
    pictures: str, out: str, hours: float, start: str | None, whole: bool, name: str | None, license: str, plan: bool
) -> int:
    """Make a cascade from a folder of pictures with captions.

    Looks at the pictures, chooses stages that this machine can train in --hours, measures their speed, prints time,
    memory and disk, trains, chooses steps and guidance on held-out pictures, and writes FOLDER/model with a card. Each
    stage has a YAML file in FOLDER, which may be edited. Stopped, the same command continues.

    \b
    cascade make pictures --out my-cascade --hours 2
    cascade make pictures --out my-cascade --hours 1 --from bundled
    """
    from cascade.making.make import Order
    from cascade.making.make import make as make_cascade

    keep_freed_memory()
    folder = Path(out)
    order = Order(
        Path(pictures), folder, hours, name or folder.name, license, _model(start), whole, lambda text: say(text)
    )
    finished = make_cascade(order, plan_only=plan)
    if not finished:
        say("cascade: stopped; the same command continues", error=True)
    elif plan:
        say(f"the settings are in {folder}; the same command without --plan trains")
    return 0 if finished else 1


def _model(start: str | None) -> str | None:
    """`bundled` is the package's own cascade, which has a folder."""
    from cascade.load.index import BUNDLED

    return str(BUNDLED) if start == "bundled" else start
