"""What a stage costs, in weights, memory and arithmetic: counted once, before anything is drawn or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from cascade.build import build_stage
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import StageConfig
from cascade.stage import Stage, blank_call, count_parameters

_WHOLE_TENSORS = 3
"""Tensors of the whole picture that any sampler holds at least: noisy picture, estimate, enlarged smaller picture."""
_MAPS_AT_ONCE = 96
"""About as many maps of the finest level are alive at once in a network call, in float32."""


@dataclass(frozen=True)
class StageCost:
    """The costs of a stage as its settings alone decide them; preflight, `info`, batch sizes and refusals read them."""

    config: StageConfig

    @cached_property
    def stage(self) -> Stage:
        """The stage without data, on torch's `meta` device."""
        return build_stage(self.config, device="meta")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return count_parameters(self.stage.network)

    @property
    def steps(self) -> int:
        """Sampling steps of a picture, by the stage's own settings."""
        return self.stage.count_steps()

    def calls(self, settings: SamplingConfig | None = None) -> int:
        """How often the network sees a picture while it is drawn: once an evaluation, twice where guidance acts."""
        settings = settings or self.config.sampling
        evaluated = self.stage.evaluations(settings)
        if settings.guidance == 1:
            return len(evaluated)
        low, high = settings.guidance_interval or (-math.inf, math.inf)
        return sum(2 if low <= level <= high else 1 for level in evaluated)

    def flops_per_call(self, text_tokens: int) -> int:
        """Multiplications and additions of one network call for one picture of the stage's own size.

        text_tokens: length of the text, to which every prompt is padded.
        """
        with torch.device("meta"), torch.inference_mode():
            z, level, cond = blank_call(self.config, 1, text_tokens)
            prepared = self.stage.network.prepare(cond)
            with FlopCounterMode(display=False) as counter:
                self.stage.network(z, level, prepared)
        return int(counter.get_total_flops())

    def least_bytes(self, size: tuple[int, int], dtype: torch.dtype, tile: int | None = None) -> float:
        """Memory without which a picture of `size` cannot be drawn, whole or in squares of side `tile`."""
        geometry, at_once = self.config.geometry, math.prod(size)
        if tile is not None:
            at_once = min(at_once, (tile + 2 * (geometry.receptive_radius or 0)) ** 2)
        picture = self.config.channels * _WHOLE_TENSORS * math.prod(size) * torch.float32.itemsize
        return picture + at_once * geometry.least_activations * dtype.itemsize

    def likely_bytes(self, size: tuple[int, int]) -> float:
        """Memory that drawing a picture of `size` takes, about."""
        return math.prod(size) * self.config.geometry.finest_width * _MAPS_AT_ONCE * torch.float32.itemsize
