"""The noise of a stage: a schedule, built by `cascade.build.build_schedule`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cascade.bounds import NoiseSteps, Side
from cascade.diffusion.noise import LOG_SNR_RANGE
from cascade.settings import Settings

LogSnr = Annotated[float, Field(ge=LOG_SNR_RANGE[0], le=LOG_SNR_RANGE[1])]


class ConstantSchedule(Settings):
    """The same beta at every step (Prince ch. 18)."""

    kind: Literal["constant"] = "constant"
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the variance that is replaced by noise in each step."""
    steps: NoiseSteps = 1000
    """Number of diffusion steps T."""


class LinearSchedule(Settings):
    """beta grows linearly from `beta_start` to `beta_end` (Ho et al. 2020)."""

    kind: Literal["linear"] = "linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Last beta."""
    steps: NoiseSteps = 1000
    """Number of diffusion steps T."""


class SquaredCosineSchedule(Settings):
    """Discrete cosine of Nichol & Dhariwal (2021) with capped betas, as diffusers and DeepFloyd IF write it."""

    kind: Literal["squared_cosine"] = "squared_cosine"
    steps: NoiseSteps = 1000
    """Number of diffusion steps T."""
    max_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Cap on beta, which would reach 1 at the last step."""


class CosineSchedule(Settings):
    """Continuous cosine; shifted by resolution when `reference_resolution` is given (simple diffusion, 2023)."""

    kind: Literal["cosine"] = "cosine"
    reference_resolution: Side | None = None
    """Resolution whose noise levels are kept: log SNR moves by 2 log(reference / resolution). None: no shift."""
    offset: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Time by which the cosine starts early, so that the first steps have some noise; 0.008 in Nichol & Dhariwal (2021)
    and Imagen."""
    log_snr_min: LogSnr = -20.0
    """Log SNR at t = 1 is clipped to this."""
    log_snr_max: LogSnr = 20.0
    """Log SNR at t = 0 is clipped to this."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(f"log_snr_min {self.log_snr_min} must be less than log_snr_max {self.log_snr_max}")
        return self


ScheduleConfig = Annotated[
    ConstantSchedule | LinearSchedule | SquaredCosineSchedule | CosineSchedule, Field(discriminator="kind")
]
