"""Trains stages on drawn shapes with conditions, and reads from their pictures whether they follow them.

python scripts/check_conditions.py --out build/conditions [--sheet docs/conditions.png]

One stage of 32 px learns two classes (`shape`, `colour`) and a number (`size`), another a picture (`outline`) and the
class `colour`, each left out in part of the views, so that each can be given alone. Neither reads text. The scenes
reader (`cascade.evaluation.scene_reader`) reads the pictures; it sees no condition.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageFilter

from cascade import CascadePipeline
from cascade.config.training import TrainConfig
from cascade.data.scenes import Scene, SceneObject, draw
from cascade.evaluation.scene_reader import Found, read_scene
from cascade.pictures.images import contact_sheet
from cascade.settings import parse
from cascade.storage.index import BUNDLED
from cascade.storage.stage import load_stage
from cascade.storage.training import load_trainer
from cascade.text.t5 import TextEncoder

SIDE = 32
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "blue", "green", "black")
SIZES = (0.16, 0.4)
"""Half the width of a shape's box, as a share of the picture's width."""
_INK = 40  # distance from white, per channel, from which a pixel belongs to a shape


@dataclass(frozen=True)
class Lesson:
    """A stage: its conditions, the shapes' distance from the middle, training steps, and what is given in the end."""

    conditions: tuple[str, ...]
    spread: float
    steps: int
    dropout: float
    given: tuple[tuple[str, ...], ...]


LESSONS = {
    "labels": Lesson(
        ("shape", "colour", "size"),
        0.02,
        8000,
        0.25,
        (("shape",), ("size",), ("shape", "size"), ("shape", "size", "colour")),
    ),
    "outlines": Lesson(("outline", "colour"), 1.0, 1500, 0.15, (("outline",), ("outline", "colour"))),
}


def random_shape(rng: random.Random, spread: float) -> SceneObject:
    """One shape; spread: its greatest distance from the middle, as a share of the width, but inside the picture."""
    radius = rng.uniform(*SIZES)
    free = min(spread, 0.5 - radius)
    x, y = (0.5 + rng.uniform(-free, free) for _ in range(2))
    return SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), "medium", x, y, radius)


def picture_of(shape: SceneObject) -> Image.Image:
    """The shape on white."""
    return draw(Scene((shape,)), SIDE)


def mask_of(picture: Image.Image) -> np.ndarray[Any, Any]:
    """(H, W) bool: the pixels that differ from white."""
    differs: np.ndarray[Any, Any] = (255 - np.asarray(picture.convert("RGB"))).max(axis=2) > _INK
    return differs


def outline_of(picture: Image.Image) -> Image.Image:
    """The shape's outline, white on black: its mask without the mask's inside."""
    mask = Image.fromarray(mask_of(picture).astype(np.uint8) * 255)
    inside = mask.filter(ImageFilter.MinFilter(3))
    return Image.fromarray(np.asarray(mask) - np.asarray(inside))


def conditions_of(shape: SceneObject) -> dict[str, Any]:
    """All conditions of a shape."""
    outline = outline_of(picture_of(shape))
    return {"shape": shape.shape, "colour": shape.colour, "size": shape.radius, "outline": outline}


def write_data(path: Path, lesson: Lesson, count: int) -> None:
    """Captionless pictures with their conditions as columns."""
    import datasets

    rng = random.Random(0)
    shapes = [random_shape(rng, lesson.spread) for _ in range(count)]
    rows: dict[str, list[Any]] = {"image": [_png(picture_of(shape)) for shape in shapes]}
    for name in lesson.conditions:
        values = [conditions_of(shape)[name] for shape in shapes]
        rows[name] = [_png(value) if isinstance(value, Image.Image) else value for value in values]
    datasets.Dataset.from_dict(rows).to_parquet(path)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def settings(out: Path, name: str, lesson: Lesson, steps: int) -> TrainConfig:
    """The training run of a lesson."""
    shared = {"dropout": lesson.dropout}
    conditions = {
        "shape": {"kind": "class", "labels": list(SHAPES), "default": "none", **shared},
        "colour": {"kind": "class", "labels": list(COLOURS), "default": "none", **shared},
        "size": {"kind": "number", "range": list(SIZES), "default": "none", **shared},
        "outline": {"kind": "picture", "default": "none", **shared},
    }
    values = {
        "output": str(out / name),
        "stage": {
            "name": "base",
            "resolution": SIDE,
            "parameterization": "x",
            "conditions": {one: conditions[one] for one in lesson.conditions},
            "model": {
                "text": "none",
                "text_dim": 192,
                "patch": 2,
                "channels": [32, 64],
                "blocks": [1, 2],
                "strides": [1, 2],
                "attention": [False, True],
                "groups": 8,
                "head_dim": 32,
                "embedding_dim": 128,
            },
            "sampling": {"steps": 20, "guidance": 2.0},
        },
        "data": {"sources": [{"kind": "parquet", "files": [str(out / f"{name}.parquet")]}], "joint_dropout": 0.05},
        "training": {
            "steps": steps,
            "batch_size": 16,
            # Noisy levels: a little noise already shows the shape, so only the noisiest views teach the class.
            "loss": {
                "space": "velocity",
                "max_weight": 400,
                "levels": {"kind": "logit_normal", "mean": 1.4, "std": 1.4},
                "stratified": True,
            },
            "optimizer": {"kind": "muon", "learning_rate": 1e-3, "warmup_steps": 50, "decay": "cosine"},
            "ema": {"half_life_images": 4000},
            "log_every": 100,
            "sample_every": 1000,
            "save_every": 1000,
        },
    }
    return parse(TrainConfig, values, "check_conditions")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def overlap(first: Image.Image, second: Image.Image) -> float:
    """Intersection over union of two shapes."""
    one, other = mask_of(first), mask_of(second)
    return float((one & other).sum() / max(1, (one | other).sum()))


def only(picture: Image.Image) -> Found | None:
    """The shape in a picture; None unless there is exactly one."""
    found = read_scene(picture).objects
    return found[0] if len(found) == 1 else None


def measured(wanted: Sequence[SceneObject], drawn: Sequence[Image.Image], names: Sequence[str]) -> dict[str, float]:
    """How well pictures follow the conditions in `names`."""
    found = [only(picture) for picture in drawn]
    figures: dict[str, float] = {}
    for name in names:
        if name in ("shape", "colour"):
            right = [
                one is not None and getattr(one, name) == getattr(shape, name)
                for one, shape in zip(found, wanted, strict=True)
            ]
            figures[f"{name}, share right"] = sum(right) / len(right)
        elif name == "size":
            radii = [0.0 if one is None else one.radius for one in found]
            figures["size, rank correlation"] = rank_correlation(radii, [shape.radius for shape in wanted])
        else:
            each = [overlap(picture_of(shape), picture) for shape, picture in zip(wanted, drawn, strict=True)]
            figures["outline, mean IoU"] = sum(each) / len(each)
    return figures


def judge(
    pipeline: CascadePipeline, lesson: Lesson, count: int
) -> tuple[list[dict[str, Any]], list[tuple[Image.Image, str]]]:
    """(a row of figures for each choice of conditions, some pictures of each with their labels)."""
    rows, cells = [], list[tuple[Image.Image, str]]()
    for number, names in enumerate(lesson.given):
        rng = random.Random(1000 + number)
        wanted = [random_shape(rng, lesson.spread) for _ in range(count)]
        drawn = pipeline(
            [""] * count,
            conditions=[{name: conditions_of(shape)[name] for name in names} for shape in wanted],
            seed=list(range(count)),
            batch_size=16,
        ).images
        images = [picture for picture in drawn if isinstance(picture, Image.Image)]
        rows.append({"given": ", ".join(names), **measured(wanted, images, names)})
        for shape, picture in zip(wanted[: 4 if "outline" in names else 8], images, strict=False):
            if "outline" in names:
                cells.append((outline_of(picture_of(shape)).convert("RGB"), "outline"))
            cells.append((picture, _label(shape, names)))
    return rows, cells


def _label(shape: SceneObject, names: Sequence[str]) -> str:
    shown: Mapping[str, str] = {"shape": shape.shape, "colour": shape.colour, "size": f"{shape.radius:.2f}"}
    return " ".join(shown[name] for name in names if name in shown) or "drawn"


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of data, runs and figures.")
@click.option("--lesson", "chosen", type=click.Choice(list(LESSONS)), multiple=True, help="Default: all.")
@click.option("--records", default=6000, show_default=True, help="Pictures to draw for training.")
@click.option("--share", default=1.0, show_default=True, help="Share of the training steps to make.")
@click.option("--count", default=200, show_default=True, help="Pictures to judge for each row.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet.")
def main(out: Path, chosen: tuple[str, ...], records: int, share: float, count: int, sheet: Path | None) -> None:
    """Train each stage unless it exists, draw, read, and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    cells = list[tuple[Image.Image, str]]()
    for name in chosen or LESSONS:
        lesson = LESSONS[name]
        if not (out / name / "stage").exists():
            write_data(out / f"{name}.parquet", lesson, records)
            load_trainer(settings(out, name, lesson, max(60, round(share * lesson.steps)))).run()
        stage = load_stage(out / name / "stage")
        pipeline = CascadePipeline(TextEncoder.from_pretrained(BUNDLED / "text_encoder"), [stage])
        rows, drawn = judge(pipeline, lesson, count)
        cells += drawn
        for row in rows:
            print(" | ".join(f"{what}: {one:.3f}" if isinstance(one, float) else one for what, one in row.items()))
        (out / f"{name}.json").write_text(json.dumps(rows, indent=2))
    if sheet is not None:
        images, labels = zip(*cells, strict=True)
        large = [image.resize((96, 96), Image.Resampling.NEAREST) for image in images]
        contact_sheet(large, columns=8, labels=labels, cell=96).quantize(64).save(sheet, optimize=True)


if __name__ == "__main__":
    main()
