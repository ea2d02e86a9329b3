"""A stage: how it draws, its presets, and all that stage.json holds."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cascade.config.common import Fraction, PositiveInt
from cascade.config.network import IFUNetConfig, ModelConfig, UNetConfig
from cascade.config.noise import CosineSchedule, ScheduleConfig, SquaredCosineSchedule
from cascade.diffusion.parameterization import Kind
from cascade.diffusion.schedules import NamedSteps, Spacing
from cascade.settings import Settings

StepCount = Annotated[int, Field(gt=0, le=1_000_000)]


class SamplingConfig(Settings):
    """How a stage draws unless the caller says otherwise."""

    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] = "ddim"
    """`ddpm` is algorithm 18.2; the others reach the same quality in fewer steps."""
    steps: StepCount = 50
    """Number of sampling steps (Heun calls the network twice in each but the last)."""
    spacing: Spacing = "t"
    """Steps are spread evenly in the schedule's time or in log SNR; `leading` and `trailing`: whole steps of a discrete
    schedule, of which the first or the last is met."""
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | NamedSteps | None = None
    """Discrete schedules: the steps themselves, numbered from 0, high noise first, or one of DeepFloyd IF's lists, in
    place of `steps` and `spacing`."""
    variance: Literal["posterior", "beta", "learned"] = "posterior"
    """Variance sigma_t^2 of `ddpm`: of the posterior, beta_t, or between them where the network says (`if_unet`)."""
    eta: Fraction = 0.0
    """`ddim`: 0 is deterministic, 1 adds as much noise as `ddpm`."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Weight of classifier-free guidance, 1 = none."""
    guidance_interval: tuple[float, float] | None = None
    """Log SNR range in which guidance acts (Kynkaanniemi et al. 2024). None: everywhere."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["clip"] | None = "clip"
    """Dynamic thresholding at a quantile such as 0.995 (Imagen), static `clip` to [-1, 1], or none."""
    threshold_maximum: Annotated[float, Field(ge=1)] | None = None
    """Dynamic thresholding divides by no more than this. None: no cap."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Super-resolution: standard deviation of the noise on the smaller picture."""
    consistency: Annotated[int, Field(ge=0)] = 0
    """Super-resolution: rounds of back-projection after the last step: the area mean of the result is compared with the
    smaller picture, and the difference, enlarged, added to it (Irani & Peleg 1991)."""

    flatten: Annotated[float, Field(ge=0, le=2)] = 0.0
    """After the last step, neighbours whose colours differ by less than about this, in [-1, 1], are averaged: the grain
    that a small network leaves in flat art goes, edges stay. Not for photographs. 0: nothing is."""

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if isinstance(self.timesteps, tuple) and (
            not self.timesteps or any(after >= before for before, after in pairwise(self.timesteps))
        ):
            raise ValueError("timesteps must fall from step to step, from high noise to low, such as [999, 500, 0]")
        return self

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise ValueError(f"guidance_interval [{low:g}, {high:g}] is empty; give the smaller log SNR first")
        return self


class PresetConfig(Settings):
    """What a named preset changes in `sampling`."""

    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] | None = None
    """See sampling.sampler."""
    steps: StepCount | None = None
    """See sampling.steps."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """See sampling.guidance."""
    aug_level: Annotated[float, Field(ge=0, lt=1)] | None = None
    """See sampling.aug_level."""


class StageConfig(Settings):
    """One diffusion model of the cascade: network, noise, and what the network predicts. Saved as stage.json."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name by which per-stage options speak of it, such as `base`; also of its folder in a cascade."""
    resolution: PositiveInt
    """Height and width of the pictures it draws by default, in pixels."""
    low_resolution: PositiveInt | None = None
    """Super-resolution: size of the smaller picture it starts from. None: a base stage."""
    path: Literal["picture", "residual"] = "picture"
    """What is diffused: the picture, or (super-resolution) its difference from the upsampled smaller one."""
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    """`path: residual`: the difference is divided by this, so that it has about unit variance."""
    parameterization: Kind = "eps"
    """What the network predicts."""
    schedule: ScheduleConfig = CosineSchedule()
    """Noise level as a function of time."""
    model: ModelConfig = UNetConfig()
    """The network."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults when drawing."""
    presets: dict[Literal["fast", "best"], PresetConfig] = Field(default_factory=dict)
    """Named changes of `sampling`; `default` is `sampling` itself."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name in ("text_encoder", "cascade"):
            raise ValueError(f"name {self.name} is taken by another part of a cascade's folder; choose another")
        if self.low_resolution is not None and self.low_resolution >= self.resolution:
            raise ValueError(f"low_resolution {self.low_resolution} must be smaller than resolution {self.resolution}")
        if self.low_resolution is not None and self.resolution % self.low_resolution:
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {self.low_resolution}")
        if self.path == "residual" and self.low_resolution is None:
            raise ValueError("path: residual needs low_resolution, the smaller picture it differs from")
        if isinstance(self.model, IFUNetConfig) and not isinstance(self.schedule, SquaredCosineSchedule):
            raise ValueError("model.kind: if_unet needs schedule.kind: squared_cosine, whose steps it was trained on")
        if self.sampling.variance == "learned" and not isinstance(self.model, IFUNetConfig):
            raise ValueError("sampling.variance: learned needs model.kind: if_unet, which predicts it")
        if self.resolution % self.model.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.model.downsampling},"
                " by which the model divides it"
            )
        return self

    @property
    def scale(self) -> int:
        """Factor from the smaller picture to this one, 1 for a base stage."""
        return self.resolution // (self.low_resolution or self.resolution)
