"""The plan of a cascade: which stages, for how many steps, measured against the time that there is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cascade.config.data import DataConfig
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.data.loader import Views
from cascade.errors import CascadeError
from cascade.making.look import Look, Pace, measure
from cascade.pictures.images import downsample, to_float, upsample
from cascade.resources.memory import StageCost
from cascade.settings import parse

# --- sizes -----------------------------------------------------------------------------------------------------------
# The sizes of cascades that `cascade make` chooses between, from a processor's half hour to a GPU's days.

TEXT_DIM = 192  # of the bundled text encoder
_NOISE = {"kind": "cosine", "log_snr_min": -11, "log_snr_max": 12}


@dataclass(frozen=True)
class Size:
    """A kind of cascade. least_views: pictures that training must show the base stage for it to be worth the size.

    base, larger: settings of the networks of the base stage and of the super-resolution stages.
    """

    resolutions: tuple[int, ...]
    least_views: int
    batch_size: int
    base: Mapping[str, Any]
    larger: Mapping[str, Any]

    def fitted(self, short_side: int) -> Size:
        """Without the stages larger than the pictures: there would be nothing to learn from."""
        kept = tuple(side for side in self.resolutions if side <= short_side)
        if not kept:
            raise CascadeError(
                f"the pictures are about {short_side} px; the smallest stage needs {self.resolutions[0]}"
            )
        return Size(kept, self.least_views, self.batch_size, self.base, self.larger)

    def stages(self, residual_scales: Mapping[int, float]) -> list[StageConfig]:
        """The stages, smallest first. residual_scales: spread of a picture around its enlarged smaller one, by size."""
        sides = self.resolutions
        found = [_base(sides[0], self.base)]
        return found + [_larger(low, side, self.larger, residual_scales[side]) for low, side in pairwise(sides)]


def _base(side: int, network: Mapping[str, Any]) -> StageConfig:
    """As the bundled base stage: it predicts v at noise levels spread normally in log SNR."""
    return parse(
        StageConfig,
        {
            "name": "base",
            "resolution": side,
            "parameterization": "v",
            "schedule": _NOISE,
            "model": {"skips": "add", "norm": "pixel", "embedding_dim": 256, "text_dim": TEXT_DIM, **network},
            "sampling": {"sampler": "dpm++", "steps": 16, "guidance": 2.0},
        },
        "base stage",
    )


def _larger(low: int, side: int, network: Mapping[str, Any], residual_scale: float) -> StageConfig:
    """As configs/small/sr256.yaml: it diffuses what the enlarged smaller picture lacks."""
    return parse(
        StageConfig,
        {
            "name": f"sr{side}",
            "resolution": side,
            "low_resolution": low,
            "path": "residual",
            "residual_scale": residual_scale,
            "parameterization": "x",
            "schedule": {"kind": "cosine", "log_snr_min": -9, "log_snr_max": 12},
            "model": {
                "skips": "add",
                "norm": "pixel",
                "embedding_dim": 128,
                "text": "pooled",
                "text_dim": TEXT_DIM,
                **network,
            },
            "sampling": {"sampler": "dpm++", "steps": 4, "aug_level": 0.05},
        },
        f"stage of {side} px",
    )


def _unet(channels: list[int], blocks: list[int], patch: int, attention: list[bool]) -> dict[str, Any]:
    strides = [1] + [2] * (len(channels) - 1)
    return {"channels": channels, "blocks": blocks, "strides": strides, "attention": attention, "patch": patch}


_SMALL_SR = _unet([32, 64], [1, 2], 2, [False, False])
_MIDDLE_SR = _unet([32, 64, 96], [1, 2, 2], 2, [False, False, False])
_LARGE_SR = _unet([64, 128, 192, 256], [2, 2, 3, 3], 2, [False] * 4)

SIZES = (
    Size((16, 32, 64), 0, 16, _unet([32, 64], [1, 2], 1, [False, True]), _SMALL_SR),
    Size((32, 64, 128), 10_000, 16, _unet([64, 128], [2, 2], 2, [False, True]), _SMALL_SR),
    Size((32, 64, 128), 60_000, 16, _unet([96, 192, 256], [2, 2, 2], 2, [False, True, True]), _MIDDLE_SR),
    Size((64, 128, 256), 400_000, 64, _unet([64, 192, 256], [2, 2, 3], 2, [False, True, True]), _MIDDLE_SR),
    Size(
        (64, 256, 1024), 4_000_000, 128, _unet([128, 256, 384, 512], [2] * 4, 1, [False, True, True, True]), _LARGE_SR
    ),
)
"""From the least to the most arithmetic."""


# --- plan ------------------------------------------------------------------------------------------------------------

logger = logging.getLogger("cascade.making")

SHARES = {1: (0.92,), 2: (0.68, 0.22), 3: (0.62, 0.18, 0.11)}
"""Shares of the time for the stages' training, by the number of stages; the rest draws, sweeps and measures."""
LEAST_STEPS = 50
_TEXT_TOKENS = 16
_LOOKED_AT = 32  # views whose detail is measured
_CHEAPER = {"cpu": 2.0}
_CHEAPER_ON_GPU = 20.0


@dataclass(frozen=True)
class Planned:
    """A stage's training run, and its measured pace."""

    config: TrainConfig
    pace: Pace

    @property
    def seconds(self) -> float:
        """Expected time of the run."""
        return self.config.training.steps * self.pace.seconds


@dataclass(frozen=True)
class Folder:
    """Paths within the folder of a cascade that is being made."""

    root: Path

    def settings(self, stage: str) -> Path:
        """The YAML file of a stage's training run."""
        return self.root / f"{stage}.yaml"

    def run(self, stage: str) -> Path:
        """The folder of a stage's training run."""
        return self.root / "runs" / stage

    def drawn(self, stage: str) -> Path:
        """Parquet file: pictures next to what the stages before `stage` draw of them."""
        return self.root / "drawn" / f"{stage}.parquet"

    @property
    def model(self) -> Path:
        """The finished cascade."""
        return self.root / "model"

    @property
    def text(self) -> Path:
        """Cached embeddings of the captions."""
        return self.root / "text"

    @property
    def scratch(self) -> Path:
        """For measuring; deleted afterwards."""
        return self.root / ".pace"

    @property
    def sweep(self) -> Path:
        """The sampling settings that were tried, with their figures."""
        return self.root / "sweep.json"


def training_run(
    stage: StageConfig,
    look: Look,
    folder: Folder,
    steps: int,
    more: Mapping[str, Any],
    text: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The training run of a stage; `more`: settings of `training` that differ from those of all stages.

    text: the encoder and how it reads; None: the bundled encoder.
    """
    optimizer = {"kind": "muon", "learning_rate": 1e-3, "weight_decay": 0.01, "decay": "linear"}
    warmup = min(100, steps // 10)
    data: dict[str, Any] = {
        "sources": [look.source().model_dump(mode="json")],
        "flip": 0.5,
        "decoded": str(folder.root / "decoded"),
    }
    training: dict[str, Any] = {
        "steps": steps,
        "precision": "auto",
        "optimizer": {**optimizer, "warmup_steps": warmup, "decay_steps": max(steps // 3, 1)},
        "log_every": 25,
        "save_every": max(steps // 20, 25),
        "sample_every": max(steps // 5, 1),
        **more,
    }
    if look.holds_out:
        held_out = look.source("held_out").model_dump(mode="json")
        training["validation"] = {"sources": [held_out], "every": max(steps // 10, 1), "batches": 2}
    if stage.low_resolution is None:
        spread = {"kind": "logit_normal", "mean": 0.25, "std": 1.5}
        training["loss"] = {"space": "v", "levels": spread, "stratified": True}
    else:
        data |= {"crop": min(64, stage.resolution), "max_aug_level": 0.3}
        levels = {"kind": "logit_normal", "mean": 0.6, "std": 1.4}
        training["loss"] = {"space": "velocity", "max_weight": 400, "levels": levels, "stratified": True}
    views = steps * int(training["batch_size"])
    training["ema"] = {"half_life_images": max(min(views // 20, 500_000), 1)}
    training |= more  # it has the last word on the loss, too
    settings = {
        "output": str(folder.run(stage.name)),
        "stage": stage.model_dump(mode="json"),
        "text": {**(text or {"encoder": "bundled"}), "cache": str(folder.text)},
        "data": data,
        "training": training,
    }
    return parse(TrainConfig, settings, f"plan of {stage.name}")


def shares_of(stages: int) -> tuple[float, ...]:
    """The shares of the time of so many stages."""
    return SHARES[stages]


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """A run with fewer steps; warm-up, decay and what happens every so many steps shrink alike."""
    training, part = config.training, steps / config.training.steps

    def less(count: int, least: int) -> int:
        return max(int(count * part), least)

    optimizer = training.optimizer.model_copy(
        update={
            "warmup_steps": less(training.optimizer.warmup_steps, 0),
            "decay_steps": less(training.optimizer.decay_steps, 0),
        }
    )
    changes = {
        "steps": steps,
        "optimizer": optimizer,
        "save_every": less(training.save_every, 1),
        "sample_every": less(training.sample_every, 1),
    }
    if training.validation:
        every = less(training.validation.every, 1)
        changes["validation"] = training.validation.model_copy(update={"every": every})
    return config.model_copy(update={"training": training.model_copy(update=changes)})


def choose(look: Look, folder: Folder, seconds: float) -> list[Planned]:
    """The stages that this machine can train in `seconds`: the largest size whose base stage sees enough pictures."""
    best: tuple[Size, Pace] | None = None
    rate = 0.0  # arithmetic per second
    for size in (one.fitted(look.short_side) for one in SIZES):
        stage = size.stages(dict.fromkeys(size.resolutions, 1.0))[0]
        flops = StageCost(stage).flops_per_call(_TEXT_TOKENS)
        budget = seconds * SHARES[len(size.resolutions)][0]
        if best and budget * rate * _gain() / flops < size.least_views:
            break
        run = training_run(stage, look, folder, LEAST_STEPS, {"batch_size": size.batch_size})
        pace = measure(run, folder.scratch)
        rate = flops * size.batch_size / pace.seconds
        views = budget / pace.seconds * size.batch_size
        logger.info(
            "%s: base stage of %.1f million weights, %.0f pictures/s, %s pictures in the time",
            " -> ".join(map(str, size.resolutions)),
            StageCost(stage).parameters / 1e6,
            size.batch_size / pace.seconds,
            f"{views:,.0f}",
        )
        if best and views < size.least_views:
            break
        best = (size, pace)
    assert best is not None
    return planned(best[0], best[1], look, folder, seconds)


def _gain() -> float:
    """How much more arithmetic per second a larger network may reach than a smaller one."""
    return _CHEAPER_ON_GPU if torch.cuda.is_available() else _CHEAPER["cpu"]


def planned(size: Size, pace: Pace, look: Look, folder: Folder, seconds: float) -> list[Planned]:
    """The runs of all stages of a size, with steps for their shares of the time. pace: the base stage's."""
    runs = []
    shares = SHARES[len(size.resolutions)]
    for stage, share in zip(size.stages(residual_scales(size.resolutions, look)), shares, strict=True):
        more = {"batch_size": size.batch_size}
        if stage.low_resolution is not None:
            pace = measure(training_run(stage, look, folder, LEAST_STEPS, more), folder.scratch)
        steps = max(int(seconds * share / pace.seconds), LEAST_STEPS)
        runs.append(Planned(training_run(stage, look, folder, steps, more), pace))
    return runs


def residual_scales(sides: Sequence[int], look: Look) -> dict[int, float]:
    """For each size but the first: standard deviation of pictures around their enlarged smaller ones."""
    stage = StageConfig(name="look", resolution=sides[-1])
    views = Views(DataConfig(sources=(look.source(),)), stage, 0)
    pictures = to_float(torch.stack([views[number].image for number in range(_LOOKED_AT)]))
    found = {}
    for low, side in pairwise(sides):
        whole = downsample(pictures, side) if side < sides[-1] else pictures
        difference = whole - upsample(downsample(whole, low), side)
        found[side] = round(max(float(difference.std()), 0.01), 3)
    return found


def lines(runs: Sequence[Planned]) -> Iterator[str]:
    """The plan as text: time, memory and disk of each stage."""
    for run in runs:
        config = run.config
        stage, training = config.stage, config.training
        yield (
            f"  {stage.name}: {stage.resolution} px, {StageCost(stage).parameters / 1e6:.1f} million weights,"
            f" {training.steps:,} steps of {training.batch_size}, {run.pace.seconds:.2f} s each,"
            f" {run.pace.memory_bytes / 1e9:.1f} GB of memory, {run.pace.disk_bytes / 1e9:.2f} GB of disk"
        )
