"""A tiny complete cascade, 8 -> 16 -> 32 px, with random weights: written by the real saving code in under a second."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers_text import make_tiny_t5

from cascade import CascadePipeline, Stage, StageConfig, TextEncoder
from cascade.config.sampling import PresetConfig, SamplingConfig
from cascade.models.unet import UNetConfig
from cascade.stage import build_stage

TEXT_DIM = 32
STAGES = ("base", "sr16", "sr32")
RESOLUTIONS = (8, 16, 32)


def tiny_stage_config(name: str, resolution: int, low_resolution: int | None = None, **changes: object) -> StageConfig:
    """A stage of two small levels that looks at the text; super-resolution with noise on the smaller picture."""
    model = UNetConfig(
        channels=(8, 16),
        blocks=(1, 1),
        strides=(1, 2),
        attention=(False, True),
        groups=4,
        head_dim=8,
        embedding_dim=16,
        text_dim=TEXT_DIM,
    )
    sampling = SamplingConfig(steps=2, guidance=2.0, aug_level=0.0 if low_resolution is None else 0.1)
    values: dict[str, object] = {
        "name": name,
        "resolution": resolution,
        "low_resolution": low_resolution,
        "parameterization": "x",
        "model": model,
        "sampling": sampling,
        "presets": {"fast": PresetConfig(steps=1)},
    }
    return StageConfig(**(values | changes))


def tiny_stage(config: StageConfig, seed: int = 0) -> Stage:
    """A stage whose weights are all random: a fresh network ends in zeros and would not see its text."""
    stage = build_stage(config, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stage.network.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    stage.network.eval().requires_grad_(False)
    return stage


def tiny_configs(**changes: object) -> list[StageConfig]:
    """The stages of the tiny cascade, in order. changes: settings of every stage."""
    lower = (None, *RESOLUTIONS)
    each = zip(STAGES, RESOLUTIONS, lower, strict=False)
    return [tiny_stage_config(name, size, low, **changes) for name, size, low in each]


def make_tiny_cascade(folder: str | Path, **changes: object) -> Path:
    """Write a tiny cascade into `folder`, which `CascadePipeline.from_pretrained` loads, and return it."""
    folder = Path(folder)
    encoder = TextEncoder.from_pretrained(make_tiny_t5(folder.with_name(f"{folder.name}-t5"), TEXT_DIM), max_length=48)
    stages = [tiny_stage(config, seed) for seed, config in enumerate(tiny_configs(**changes))]
    CascadePipeline(encoder, stages, name="tiny", license="CC0-1.0").save_pretrained(folder)
    return folder
