"""The sizes of cascades that `cascade make` chooses between, from a processor's half hour to a GPU's days."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.settings import parse

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
