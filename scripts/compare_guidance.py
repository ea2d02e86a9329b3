"""What each kind of guidance does to the scenes suite, or to the art suite: one table for a cascade's base stage.

    python scripts/compare_guidance.py [MODEL] [--weights 3,6] [--limit 60] [--weaker STAGE] [--kind NAME ...]
    python scripts/compare_guidance.py [MODEL] --data DATA    # the art suite, with the folder of prepare_data.py

The same prompts and seeds are drawn with every kind at every weight; the last row has the true pictures. In the scenes'
table "saturated" is the share of the colour values at 0 or 255 in the parts of a picture that are not background:
guidance that burns colours raises it. Autoguidance needs `--weaker`, the folder of a worse version of the stage, such
as an earlier checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from cascade import CascadePipeline, Stage
from cascade.data.scenes import draw
from cascade.drawing.slots import StageSlot
from cascade.evaluation import art, report, scenes
from cascade.evaluation.report import Request
from cascade.evaluation.scene_reader import read_scene
from cascade.storage.stage import load_stage

AUTOGUIDANCE = "autoguidance"
KINDS: dict[str, dict[str, Any]] = {
    "interval": {},
    "everywhere": {"guidance_interval": None},
    "schedule": {"guidance_interval": None, "guidance_schedule": ((-4.0, 1.0), (4.0, 0.0))},
    "rescale": {"guidance_rescale": 0.7},
    "projection": {"projection": {"parallel": 0.0}},
    "momentum": {"projection": {"parallel": 0.0, "momentum": -0.5, "radius": 0.3}},
    AUTOGUIDANCE: {},
}
"""Changes to the stage's sampling settings, by name. interval: the model's own. schedule: full below log SNR -4,
falling to none at 4. momentum: projection with the momentum of Sadat et al. 2024."""
FIGURES = ("all correct", "attribute: shape", "attribute: colour", "attribute: count")
ART = (
    "retrieval at",
    "sliced Wasserstein",
    "kernel",
    "precision",
    "recall",
    "style obeyed",
    "flat pixels",
    "edge width",
)
"""Beginnings of the names of the art suite's figures that the table shows."""
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


Measure = Callable[[CascadePipeline], dict[str, float]]
"""Draws with a pipeline and measures."""


def rows(
    pipeline: CascadePipeline, kinds: Sequence[str], weights: Sequence[float], weaker: Stage | None, measure: Measure
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """(kind, weight, figures), measured one after the other."""
    stage = pipeline.slots[0].load()
    for weight in weights:
        for kind in kinds:
            own = weaker if kind == AUTOGUIDANCE else None
            pipeline.slots[0] = StageSlot.holding(changed(stage, kind, weight, own))
            yield kind, weight, measure(pipeline)
    pipeline.slots[0] = StageSlot.holding(stage)


def on_scenes(request: Request, side: int) -> tuple[Measure, dict[str, float]]:
    """The measure, and the figures of the true scenes."""
    asked = scenes.items(request.seed)[: request.limit]
    truths = [draw(item.scene, side) for item in asked]

    def measure(pipeline: CascadePipeline) -> dict[str, float]:
        return _figures(asked, report.draw(pipeline, [item.prompt for item in asked], request), truths)

    return measure, _figures(asked, truths, truths)


def on_art(request: Request) -> tuple[Measure, dict[str, float]]:
    """The measure; the true pictures' figures are known after the first use of it, and fill the dictionary then."""
    truths: dict[str, float] = {}

    def measure(pipeline: CascadePipeline) -> dict[str, float]:
        figures = [one for one in art.run(pipeline, request).figures if one.name.startswith(ART)]
        figures = [one for one in figures if ":" not in one.name and not one.name.endswith("of the true pictures'")]
        truths.update({one.name: one.reference for one in figures if one.reference is not None})
        return {one.name: one.value for one in figures}

    return measure, truths


def _figures(
    asked: Sequence[scenes.Item], pictures: Sequence[Image.Image], truths: Sequence[Image.Image]
) -> dict[str, float]:
    judged = [
        [scenes.judge(item, read_scene(picture)) for item, picture in zip(asked, each, strict=True)]
        for each in (pictures, truths)
    ]
    measured = {figure.name: figure.value for figure in scenes.figures(asked, *judged)}
    return {**{name: measured[name] for name in FIGURES}, "saturated": saturated(pictures)}


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--weights", default="3,6", help="Weights of guidance.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Kinds of guidance. Default: all.")
@click.option("--limit", default=60, help="Prompts.")
@click.option("--seed", default=0)
@click.option("--weaker", type=click.Path(exists=True, path_type=Path), help="A worse version of the base stage.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Prepared art, for the art suite.")
def main(
    model: str | None,
    weights: str,
    kinds: tuple[str, ...],
    limit: int,
    seed: int,
    weaker: Path | None,
    data: Path | None,
) -> None:
    """Print the table."""
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    worse = None if weaker is None else load_stage(weaker)
    if worse is None and AUTOGUIDANCE in kinds:
        raise click.UsageError("autoguidance needs --weaker, the folder of a worse version of the stage")
    chosen = kinds or tuple(kind for kind in KINDS if worse or kind != AUTOGUIDANCE)
    side = pipeline.slots[0].config.resolution
    request = Request(seed=seed, limit=limit, until=side, data=data)
    click.echo(f"{pipeline.name}, seed {seed}, {limit} prompts\n")
    measure, truths = on_scenes(request, side) if data is None else on_art(request)
    named = False
    for kind, weight, figures in rows(pipeline, chosen, [float(one) for one in weights.split(",")], worse, measure):
        if not named:
            click.echo(f"| guidance | weight | {' | '.join(figures)} |")
            click.echo("|" + " --- |" * (len(figures) + 2))
            named = True
        click.echo(f"| {kind} | {weight:g} | {' | '.join(f'{value:.3f}' for value in figures.values())} |")
    click.echo(f"| true pictures | | {' | '.join(f'{value:.3f}' for value in truths.values())} |")


if __name__ == "__main__":
    main()
