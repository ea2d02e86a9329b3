"""What each kind of guidance does to the scenes suite: one table for a cascade's base stage.

    python scripts/compare_guidance.py [MODEL] [--weights 3,6] [--limit 60] [--weaker STAGE]

The same prompts and seeds are drawn with every kind at every weight. Besides the suite's figures the table has
"saturated", the share of the colour values at 0 or 255 in the parts of a picture that are not background, with that of
the true scenes in its last row: guidance that burns colours raises it. Autoguidance needs `--weaker`, the folder of a
worse version of the stage, such as an earlier checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from cascade import CascadePipeline, Stage
from cascade.data.scenes import draw
from cascade.drawing.slots import StageSlot
from cascade.evaluation import report, scenes
from cascade.evaluation.report import Request
from cascade.evaluation.scene_reader import read_scene
from cascade.storage.stage import load_stage

KINDS: dict[str, dict[str, Any]] = {
    "the model's own interval": {},
    "at all noise levels": {"guidance_interval": None},
    "schedule: full above log SNR -4, falling to none at 4": {
        "guidance_interval": None,
        "guidance_schedule": ((-4.0, 1.0), (4.0, 0.0)),
    },
    "rescale 0.7": {"guidance_rescale": 0.7},
    "projection 0": {"projection": {"parallel": 0.0}},
    "projection 0, momentum -0.5, radius 0.3": {
        "projection": {"parallel": 0.0, "momentum": -0.5, "radius": 0.3},
    },
}
"""Changes to the stage's sampling settings, by name."""
AUTOGUIDANCE = "autoguidance"
FIGURES = ("all correct", "attribute: shape", "attribute: colour", "attribute: count")
_WHITE = 235  # a pixel with a smaller value is not background


def changed(stage: Stage, kind: str, weight: float, weaker: Stage | None) -> Stage:
    """The stage with a kind of guidance; its network is shared."""
    own = stage.config.sampling
    changes = {"autoguidance": weight} if kind == AUTOGUIDANCE else {"guidance": weight, **KINDS[kind]}
    sampling = type(own).model_validate({**own.model_dump(), **changes})
    return replace(stage, config=stage.config.model_copy(update={"sampling": sampling}), weaker=weaker)


def saturated(pictures: Sequence[Image.Image]) -> float:
    """Share of the colour values at 0 or 255, among pixels that are not near white."""
    values = np.concatenate([np.asarray(picture.convert("RGB")).reshape(-1, 3) for picture in pictures])
    drawn = values[(values < _WHITE).any(axis=1)]
    return float(((drawn == 0) | (drawn == 255)).mean()) if len(drawn) else 0.0


def rows(
    pipeline: CascadePipeline, kinds: Sequence[str], weights: Sequence[float], request: Request, weaker: Stage | None
) -> Iterator[tuple[str, float, list[float]]]:
    """(kind, weight, the figures and "saturated"), drawn one after the other."""
    stage = pipeline.slots[0].load()
    asked = scenes.items(request.seed)[: request.limit]
    truths = [draw(item.scene, stage.config.resolution) for item in asked]
    for weight in weights:
        for kind in kinds:
            own = weaker if kind == AUTOGUIDANCE else None
            pipeline.slots[0] = StageSlot.holding(changed(stage, kind, weight, own))
            pictures = report.draw(pipeline, [item.prompt for item in asked], request)
            yield kind, weight, _figures(asked, pictures, truths)
    pipeline.slots[0] = StageSlot.holding(stage)
    yield "true scenes", 1.0, _figures(asked, truths, truths)


def _figures(
    asked: Sequence[scenes.Item], pictures: Sequence[Image.Image], truths: Sequence[Image.Image]
) -> list[float]:
    judged = [
        [scenes.judge(item, read_scene(picture)) for item, picture in zip(asked, each, strict=True)]
        for each in (pictures, truths)
    ]
    measured = {figure.name: figure.value for figure in scenes.figures(asked, *judged)}
    return [*(measured[name] for name in FIGURES), saturated(pictures)]


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--weights", default="3,6", help="Weights of guidance.")
@click.option("--limit", default=60, help="Prompts.")
@click.option("--seed", default=0)
@click.option("--weaker", type=click.Path(exists=True, path_type=Path), help="A worse version of the base stage.")
def main(model: str | None, weights: str, limit: int, seed: int, weaker: Path | None) -> None:
    """Print the table."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    worse = None if weaker is None else load_stage(weaker)
    kinds = [*KINDS, *([AUTOGUIDANCE] if worse else [])]
    request = Request(seed=seed, limit=limit, until=pipeline.slots[0].config.resolution)
    click.echo(f"{pipeline.name}, seed {seed}, {limit} prompts\n")
    click.echo(f"| guidance | weight | {' | '.join(FIGURES)} | saturated |")
    click.echo("|" + " --- |" * (len(FIGURES) + 3))
    for kind, weight, figures in rows(pipeline, kinds, [float(one) for one in weights.split(",")], request, worse):
        click.echo(f"| {kind} | {weight:g} | {' | '.join(f'{value:.3f}' for value in figures)} |")


if __name__ == "__main__":
    main()
