"""A trace: a stage's inputs and outputs at each sampling step of one picture.

A traced stage draws the same bits as the stage itself: a recorder only observes its denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.diffusion.noise import Denoiser, Estimate, diffuse, number_of, x_of
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import Step, Task
from cascade.models.attention import ReadsText
from cascade.stage import Stage

LARGEST_ATTENTION = 64
"""Largest side of an attention map, in pixels: networks have attention at this size or below."""


@dataclass(frozen=True)
class Call:
    """A call of the denoiser. z, x_cond, x_null: (C, H, W) of the diffused variable; x_null is None without guidance.

    attention: see `Moment`.
    """

    log_snr: float
    z: Tensor
    x_cond: Tensor
    x_null: Tensor | None
    attention: Tensor | None


@dataclass(frozen=True)
class Moment:
    """One sampling step. Pictures are (C, H, W) float32 on the CPU, in about [-1, 1].

    log_snr: noise level of `z`. z: the noisy picture; for a stage on the residual path, the enlarged smaller picture
    plus the noisy residual. x_hat: the sampler's estimate of the clean picture, guided and thresholded. guidance:
    x_cond - x_null, None where guidance does not act. attention: (words, h, w), the share of attention that each word
    receives at each position, the mean over layers and heads; None for a network without attention to text.
    """

    log_snr: float
    z: Tensor
    x_hat: Tensor
    guidance: Tensor | None
    attention: Tensor | None


@dataclass
class StageTrace:
    """The steps of one stage, from noise to the picture. It diffuses (picture - base) / scale."""

    stage: Stage
    base: Tensor
    scale: float
    noise: Tensor | None = None
    moments: list[Moment] = field(default_factory=list)

    def add(self, call: Call, x_hat: Tensor) -> None:
        """Add a step: its first call, and the picture x_hat after it."""
        self.noise = call.z if self.noise is None else self.noise
        guidance = None if call.x_null is None else self.scale * (call.x_cond - call.x_null)
        z = self.base + self.scale * call.z
        self.moments.append(Moment(call.log_snr, z, x_hat, guidance, call.attention))

    def noised(self, moment: Moment) -> Tensor:
        """The forward process for comparison: the finished picture at the step's noise level, (C, H, W).

        Source: Prince (2023) eq. 18.8, with the noise from which drawing started.
        """
        assert self.noise is not None, "there is a step"
        r = (self.moments[-1].x_hat - self.base) / self.scale
        level = torch.full((1, 1, 1, 1), moment.log_snr)
        return self.base + self.scale * diffuse(r[None], self.noise[None], level)[0]


class Recorder:
    """Records the drawing of one picture; of a batch, the first."""

    def __init__(self, words: Mapping[str, Sequence[int]]) -> None:
        """words: rows of the token embeddings, by word; see `cascade.text.t5.words_of`."""
        self.words, self.stages = words, list[StageTrace]()
        self._batch = 1
        self._call: Call | None = None

    def begin(self, stage: Stage, base: Tensor, scale: float) -> None:
        """Start the record of a stage. base: (B, C, H, W)."""
        self.stages.append(StageTrace(stage, _first(base), scale))
        self._batch, self._call = len(base), None

    def called(self, z: Tensor, log_snr: Tensor, x: Tensor, attention: Tensor | None) -> None:
        """Record a call of the denoiser with z and result x: (B or 2 B, C, H, W), both halves where guidance acts."""
        if self._call is None:  # later calls of the same step are not recorded
            x_null = _first(x[self._batch :]) if len(x) > self._batch else None
            self._call = Call(number_of(log_snr), _first(z), _first(x), x_null, attention)

    def step(self, step: Step) -> None:
        """Record the end of a step."""
        assert self._call is not None, "a step calls the denoiser"
        self.stages[-1].add(self._call, _first(step.x_hat))
        self._call = None


@dataclass
class TracedStage(Stage):
    """A stage with a recorder."""

    recorder: Recorder = field(kw_only=True)

    def origin(self, cond: Conditioning, size: tuple[int, int]) -> Tensor:
        """See `Stage.origin`; sampling calls it once, at its start."""
        base = super().origin(cond, size)
        self.recorder.begin(self, base, self.residual_scale)
        return base

    def prepare(self, cond: Conditioning) -> Denoiser:
        """See `Stage.prepare`."""
        denoise = super().prepare(cond)

        def heard(z: Tensor, log_snr: Tensor) -> Estimate:
            with _attention(self.network, list(self.recorder.words.values())) as maps:
                estimate = denoise(z, log_snr)
            self.recorder.called(z, log_snr, x_of(estimate), _mean(maps, (z.shape[-2], z.shape[-1])))
            return estimate

        return heard


def traced(task: Task, recorder: Recorder) -> Task:
    """The same task with a recorder."""

    def slot_of(slot: StageSlot) -> StageSlot:
        def load() -> Stage:
            stage = slot.load()
            return TracedStage(stage.config, stage.network, stage.schedule, stage.known, recorder=recorder)

        return replace(slot, load=load)

    return replace(task, passes=[replace(drawing, slot=slot_of(drawing.slot)) for drawing in task.passes])


@contextmanager
def _attention(network: nn.Module, words: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
    """A context with a list of attention maps, (words, places) per layer, of the first picture; each call fills it."""
    maps: list[Tensor] = []

    def listen(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, ReadsText), "only those are listened to"
        shares = layer.text_shares(*given)
        if shares is not None:
            each = shares[0].float().mean(0)  # (places, tokens)
            maps.append(torch.stack([each[:, list(rows)].sum(1) for rows in words]).cpu())

    layers = [layer for layer in network.modules() if isinstance(layer, ReadsText)] if words else []
    handles = [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _mean(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor | None:
    """The mean of maps of several levels, each (words, places) of a picture of `size`: (words, h, w)."""
    if not maps:
        return None
    shrink = max(1.0, max(size) / LARGEST_ATTENTION)
    shown = max(1, round(size[0] / shrink)), max(1, round(size[1] / shrink))
    laid = []
    for each in maps:
        step = math.sqrt(size[0] * size[1] / each.shape[1])
        level = each.unflatten(1, (round(size[0] / step), round(size[1] / step)))
        laid.append(F.interpolate(level[None], size=shown, mode="bilinear", align_corners=False)[0])
    return torch.stack(laid).mean(0)


def _first(pictures: Tensor) -> Tensor:
    return pictures[0].float().cpu()
