"""Settings for drawing: sampler, steps, guidance, thresholding; and the presets that change them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cascade.bounds import ROUNDS, SAMPLING_STEPS
from cascade.config.samplers import DEFAULT_SAMPLER, SECTIONS, AnySampler, with_sampler_section
from cascade.diffusion.schedules import NamedSteps, Spacing
from cascade.settings import Settings

StepCount = Annotated[int, Field(gt=0), SAMPLING_STEPS.validator]


class ProjectionConfig(Settings):
    """Adaptive projected guidance (Sadat et al. 2024), which avoids the burnt colours of strong guidance."""

    parallel: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor on the part of the update along the guided picture, which saturates colours; 1 keeps it."""
    momentum: Annotated[float, Field(gt=-1, lt=1)] = 0.0
    """Weight of earlier updates; negative: each step corrects the one before."""
    radius: Annotated[float, Field(gt=0)] | None = None
    """Largest root mean square of the update, before the weight. None: no limit."""


class SamplingConfig(Settings):
    """Settings for drawing, which the caller may override."""

    sampler: AnySampler = SECTIONS[DEFAULT_SAMPLER](kind=DEFAULT_SAMPLER)
    """A name, or a section with the sampler's own settings: {kind: ddim, eta: 0.5}. `ddpm` is algorithm 18.2; the
    others reach the same quality in fewer steps."""
    steps: StepCount = 50
    """Number of sampling steps (Heun calls the network twice in each but the last)."""
    spacing: Spacing = "t"
    """Steps are spread evenly in the schedule's time or in log SNR; `leading` and `trailing`: evenly over the steps of
    a discrete schedule, including its first or its last."""
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | NamedSteps | None = None
    """Discrete schedules: the list of steps, numbered from 0, high noise first, or the name of one of DeepFloyd IF's
    lists; replaces `steps` and `spacing`."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of classifier-free guidance, 1 = none."""
    guidance_of: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of single conditions, `text` among them; the others act together, with the weight `guidance` (Brooks et
    al. 2023, eq. 3, in the order of the stage's conditions, text last). Empty: all act together."""
    guidance_interval: tuple[float, float] | None = None
    """Log SNR range in which guidance acts (Kynkaanniemi et al. 2024). None: everywhere."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far guidance's increase of contrast is undone, picture by picture (Lin et al. 2023)."""
    guidance_schedule: tuple[tuple[float, float], ...] | None = None
    """Points (log SNR, factor on guidance - 1), with straight lines in between. None: the factor is 1."""
    projection: ProjectionConfig | None = None
    """Adaptive projected guidance. None: off."""
    autoguidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of guidance away from a weaker version of the stage, if there is one, in place of `guidance` (Karras et
    al. 2024). 1: off."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["clip"] | None = "clip"
    """Dynamic thresholding at a quantile such as 0.995 (Imagen), static `clip` to [-1, 1], or none."""
    threshold_maximum: Annotated[float, Field(ge=1)] | None = None
    """Dynamic thresholding divides by no more than this. None: no cap."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Super-resolution: standard deviation of the noise on the smaller picture."""
    consistency: Annotated[int, Field(ge=0), ROUNDS.validator] = 0
    """Super-resolution: rounds of back-projection after the last step: the difference between the smaller picture and
    the result's area mean is enlarged and added (Irani & Peleg 1991)."""
    flatten: Annotated[float, Field(ge=0, le=2)] = 0.0
    """After the last step, neighbours whose colours differ by less than about this, in [-1, 1], are averaged: it
    removes the grain of a small network in flat art, and keeps edges. Not for photographs. 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _in_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # pydantic no longer treats a validator's result as JSON, and its strict tuples then reject lists.
        plain = {name: _as_tuples(value) for name, value in values.items()}
        return with_sampler_section(plain)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that are newer than some pictures and off, so that those pictures' recipes stay the same."""
        values: dict[str, Any] = write(self)
        newer: dict[str, Any] = {"guidance_rescale": 0.0, "guidance_schedule": None, "projection": None}
        newer |= {"autoguidance": 1.0, "guidance_of": {}}
        return {name: value for name, value in values.items() if name not in newer or value != newer[name]}

    @model_validator(mode="after")
    def _scheduled(self) -> Self:
        points = self.guidance_schedule
        if points is not None and (not points or any(b[0] <= a[0] for a, b in pairwise(points))):
            raise ValueError("guidance_schedule: expected points in increasing order of log SNR")
        if self.guidance_of and (points is not None or self.projection is not None or self.guidance_rescale):
            raise ValueError("guidance_of excludes guidance_schedule, guidance_rescale and projection; remove one")
        if points is not None and self.projection is not None:
            raise ValueError("guidance_schedule and projection exclude each other; remove one")
        return self

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if isinstance(self.timesteps, tuple) and (
            not self.timesteps or any(after >= before for before, after in pairwise(self.timesteps))
        ):
            raise ValueError("timesteps must decrease, from high noise to low, such as [999, 500, 0]")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise ValueError(f"guidance_interval [{low:g}, {high:g}] is empty; give the smaller log SNR first")
        return self


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


class PresetConfig(Settings):
    """The changes that a named preset makes to `sampling`."""

    sampler: AnySampler | None = None
    """See sampling.sampler."""
    steps: StepCount | None = None
    """See sampling.steps."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """See sampling.guidance."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] | None = None
    """See sampling.aug_level."""
