"""The cost of a stage in weights, memory and arithmetic, counted before anything is drawn or trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.flop_counter import FlopCounterMode

from cascade.build import build_stage
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import StageConfig
from cascade.stage import Stage, blank_call, calls_at_once, count_parameters

_WHOLE_TENSORS = 3
"""Tensors of picture size that every sampler holds: noisy picture, estimate, enlarged smaller picture."""
_MAPS_AT_ONCE = 96
"""Approximate number of feature maps of the finest level that are alive together in a network call, in float32."""


@dataclass(frozen=True)
class StageCost:
    """The costs that follow from a stage's settings alone; used by preflight, `info`, batch sizes and memory checks."""

    config: StageConfig

    @cached_property
    def stage(self) -> Stage:
        """The stage with weights on torch's `meta` device, which holds no data."""
        return build_stage(self.config, device="meta")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return count_parameters(self.stage.network)

    @property
    def steps(self) -> int:
        """Sampling steps per picture with the stage's own settings."""
        return self.stage.count_steps()

    def calls(self, settings: SamplingConfig | None = None) -> int:
        """Network calls per picture: one per evaluation of the denoiser, two where guidance acts."""
        settings = settings or self.config.sampling
        evaluated = self.stage.evaluations(settings)
        guided = calls_at_once(self.config, settings)
        if guided == 1:
            return len(evaluated)
        low, high = settings.guidance_interval or (-math.inf, math.inf)
        return sum(guided if low <= level <= high else 1 for level in evaluated)

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
        """Lower bound on the memory to draw a picture of `size`, whole or in square tiles of side `tile`."""
        geometry, at_once = self.config.geometry, math.prod(size)
        if tile is not None:
            at_once = min(at_once, (tile + 2 * (geometry.receptive_radius or 0)) ** 2)
        picture = self.config.pictures.channels * _WHOLE_TENSORS * math.prod(size) * torch.float32.itemsize
        return picture + at_once * geometry.least_activations * dtype.itemsize

    def likely_bytes(self, size: tuple[int, int]) -> float:
        """Approximate memory to draw a picture of `size`."""
        return math.prod(size) * self.config.geometry.finest_width * _MAPS_AT_ONCE * torch.float32.itemsize
