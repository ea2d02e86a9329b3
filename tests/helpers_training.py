"""Shared helpers of the training tests: a micro stage with steps of milliseconds, and a text encoder without T5."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.settings import override, parse, to_yaml
from cascade.stage import Stage, build_stage
from cascade.training.log import MEASURED
from cascade.training.memory import check_run

TEXT_DIM = 16


class WordEncoder:
    """Each word is a fixed random vector, and the end of a text another. `before` is called before each encoding."""

    dim = TEXT_DIM
    fingerprint = "words"

    def __init__(self, before: Callable[[int], None] | None = None, delay_seconds: float = 0.0) -> None:
        self.calls = 0
        self.device: torch.device | str | None = None
        self._before = before
        self._delay_seconds = delay_seconds

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:  # noqa: ARG002 - the protocol's
        self.calls += 1
        time.sleep(self._delay_seconds)
        if self._before is not None:
            self._before(self.calls)
        return TextEmbeddings.from_rows([torch.stack([_vector(word) for word in [*p.split(), ""]]) for p in prompts])

    def to(self, device: torch.device | str | None = None) -> WordEncoder:
        """There is nothing to move but this note of it."""
        self.device = device
        return self

    def release(self) -> None:
        """There is nothing to free."""


def _vector(word: str) -> Tensor:
    rng = random.Random(word)
    return torch.tensor([rng.gauss(0, 1) for _ in range(TEXT_DIM)])


def micro_settings(output: Path) -> dict[str, Any]:
    """An 8 px base stage with attention, on drawn scenes."""
    return {
        "output": str(output),
        "stage": {
            "name": "base",
            "resolution": 8,
            "model": {
                "channels": [8],
                "blocks": [1],
                "strides": [1],
                "attention": [True],
                "head_dim": 8,
                "groups": 4,
                "embedding_dim": 16,
                "text_dim": TEXT_DIM,
            },
            "sampling": {"steps": 2},
        },
        "data": {"sources": [{"kind": "scenes"}]},
        "training": {
            "steps": 4,
            "batch_size": 4,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
            "ema": {"half_life_images": 20},
            "log_every": 1,
        },
    }


def micro_config(output: Path, *assignments: str) -> TrainConfig:
    """A training run of 4 steps, with `key=value` changes."""
    return parse(TrainConfig, override(micro_settings(output), assignments), "micro")


SUPER_RESOLUTION = (
    "stage.name=sr",
    "stage.low_resolution=4",
    "stage.path=residual",
    "stage.residual_scale=0.2",
    "stage.model.attention=[false]",
    "stage.model.text=pooled",
    "stage.model.norm=pixel",
    "stage.model.skips=add",
)
"""Changes that make of the micro base stage a 4 -> 8 px stage."""


TRANSFORMER = (
    "stage.parameterization=x",
    "stage.model={kind: transformer, width: 16, depth: 2, patch: 2, bottleneck: 8, head_dim: 8, embedding_dim: 16,"
    " text_dim: 16}",
)
"""Changes that give the micro stage a transformer."""


def trainer(config: TrainConfig, text: WordEncoder | None = None) -> Any:
    """A Trainer as in `cascade train`, but with a text encoder of words and without zero weights.

    Behind a zero last layer most of a network would have no effect.
    """
    from cascade.storage.training import load_trainer

    def filled(settings: StageConfig, seed: int) -> Stage:
        stage = build_stage(settings, seed=seed)
        fill(stage.network, seed)
        return stage

    with (
        patch("cascade.storage.training.check_run", _check_once),
        patch("cascade.storage.training.load_text_encoder", lambda _settings: text or WordEncoder()),
        patch("cascade.storage.training.build_stage", filled),
    ):
        return load_trainer(config)


_checked: set[tuple[str, int, bool]] = set()


def _check_once(config: TrainConfig, processes: int, sharded: bool) -> None:
    """The checks before a run, which take a third of a second, once for equal settings."""
    settings = (to_yaml(config.model_copy(update={"output": "anywhere"})), processes, sharded)
    if settings not in _checked:
        check_run(config, processes, sharded)
        _checked.add(settings)


def fill(network: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Add noise to every weight."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=rng)


def log_entries(output: Path, without: Sequence[str] = MEASURED) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


def write_pictures(folder: Path, pictures: dict[str, Image.Image]) -> Path:
    """Write a folder of pictures with caption files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (caption, picture) in enumerate(pictures.items()):
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder
