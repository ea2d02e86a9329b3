"""Training recipe of the two bundled stages, in addition to their settings in configs/bundled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.settings import parse, read_yaml
from gpu.loop import Phase, Task
from gpu.loss import Levels
from gpu.views import Views

SHARES = {
    "noto": 9.0,
    "twemoji": 9.0,
    "fluent_flat": 9.0,
    "fluent_color": 9.0,
    "fluent_3d": 9.0,
    "fluent_mono": 4.0,
    "emojione": 7.0,
    "blob": 5.0,
    "fxemoji": 4.0,
    "clipart": 6.0,
    "freemoji": 4.0,
    "game_icon": 3.0,
    "office_color": 1.0,
    "sticker": 0.5,
    "flat_color": 1.0,
    "pixel_emoji": 1.5,
    "pixel_sprite": 1.0,
}
"""Shares of the views of art, by style, largest for the most prominent styles. Other styles share REST."""
REST = 8.0
NO_SQUARES = {"pixel_emoji": 0.0, "pixel_sprite": 0.0}
"""Left out of super-resolution, which would learn to draw squares."""


@dataclass(frozen=True)
class Recipe:
    """Training recipe of a stage, in addition to its settings."""

    levels: Levels
    dropout: float = 0.0
    flatness: float = 0.0


RECIPES = {
    "base": Recipe(Levels(-0.5, 3.0), dropout=0.1),
    "sr256": Recipe(Levels(0.0, 2.5), flatness=0.1),
}


def stage_config(configs: Path, name: str, dropout: float = 0.0) -> StageConfig:
    """The stage of <configs>/<name>.yaml. Raises CascadeError for a missing file or wrong settings."""
    file = configs / f"{name}.yaml"
    stage = read_yaml(file).get("stage")
    if not isinstance(stage, dict) or not isinstance(stage.get("model"), dict):
        raise CascadeError(f"{file}: has no section `stage` with a `model`; name a folder such as configs/bundled")
    return parse(StageConfig, stage | {"model": stage["model"] | {"dropout": dropout}}, f"{file}: stage")


def task(configs: Path, name: str, views: Views, compiled: bool) -> Task:
    """The training task of a stage."""
    recipe = RECIPES[name]
    return Task(stage_config(configs, name, recipe.dropout), views, recipe.levels, recipe.flatness, compiled)


def phases(name: str, batch: int, crops: float = 0.0) -> tuple[Phase, ...]:
    """The phases of training. crops: share of the time in which 64 -> 256 trains on crops of 128 px."""
    if name == "base":
        return (Phase(0.0, 64, batch),)
    whole = Phase(crops, 256, max(batch // 4, 1))
    return (Phase(0.0, 128, batch), whole) if crops else (whole,)
