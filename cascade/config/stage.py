"""A stage: its network, its noise, what the network predicts and how it draws; all that stage.json holds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cascade.bounds import Side
from cascade.config.network import ModelConfig
from cascade.config.noise import CosineSchedule, ScheduleConfig
from cascade.config.samplers import SamplerConfig
from cascade.config.sampling import PresetConfig, SamplingConfig
from cascade.diffusion.parameterization import Kind
from cascade.models.network import Geometry
from cascade.models.unet import UNetConfig
from cascade.settings import Settings

PICTURE_CHANNELS = 3
"""Red, green, blue: of what a stage draws and of the smaller picture that it starts from."""


class StageConfig(Settings):
    """One diffusion model of the cascade: network, noise, and what the network predicts. Saved as stage.json."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name by which per-stage options speak of it, such as `base`; also of its folder in a cascade."""
    resolution: Side
    """Height and width of the pictures it draws by default, in pixels."""
    low_resolution: Side | None = None
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
        needed = self.model.needs_schedule
        if needed not in (None, self.schedule.kind):
            raise ValueError(
                f"model.kind: {self.model.kind} needs schedule.kind: {needed}, whose steps it was trained on"
            )
        self.check_sampler(self.sampling.sampler)
        if self.resolution % self.geometry.divisor:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.geometry.divisor},"
                " by which the model divides it"
            )
        return self

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises ValueError for a sampler that needs a variance which this stage's network does not predict."""
        if sampler.own.get("variance") == "learned" and not self.model.predicts_variance:
            raise ValueError(
                f"sampler.variance: learned needs a network that predicts it, which model.kind: {self.model.kind} does"
                " not; choose posterior, beta or between"
            )

    @property
    def channels(self) -> int:
        """Channels of its pictures; nothing else says how many they have."""
        return PICTURE_CHANNELS

    @property
    def geometry(self) -> Geometry:
        """How its network lies over a picture."""
        return self.model.geometry(self.channels)

    @property
    def scale(self) -> int:
        """Factor from the smaller picture to this one, 1 for a base stage."""
        return self.resolution // (self.low_resolution or self.resolution)
