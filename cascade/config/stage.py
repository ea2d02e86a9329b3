"""A stage: its network, its noise, what the network predicts and how it draws; the content of stage.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import torch
from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator
from torch import Tensor

from cascade.conditions.settings import RESERVED, TEXT, ConditionConfig, ConditionName, PictureCondition
from cascade.config.data import FORMAT_VERSION, TextReading, check_format
from cascade.config.sampling import PresetConfig, SamplerConfig, SamplingConfig
from cascade.diffusion.noise import LOG_SNR_RANGE, Prediction
from cascade.errors import quoted
from cascade.files.atomic import atomic_folder, read_json, write_json
from cascade.files.tensors import save_tensors
from cascade.models.if_unet import IFUNetConfig
from cascade.models.network import Geometry
from cascade.models.transformer import TransformerConfig
from cascade.models.unet import UNetConfig
from cascade.pictures.format import NAMED, PictureFormat, ValueType
from cascade.settings import NoiseSteps, Settings, Side, parse

# --- network ---------------------------------------------------------------------------------------------------------
# The networks that a stage can have; each has its settings in the same file.


def _kind_of_model(value: Any) -> Any:
    """Read a model without `kind` as the U-Net, because older files have no `kind`."""
    return value.get("kind", "unet") if isinstance(value, dict) else getattr(value, "kind", "unet")


ModelConfig = Annotated[
    Annotated[UNetConfig, Tag("unet")]
    | Annotated[IFUNetConfig, Tag("if_unet")]
    | Annotated[TransformerConfig, Tag("transformer")],
    Discriminator(_kind_of_model),
]


# --- noise -----------------------------------------------------------------------------------------------------------
# The noise of a stage: a schedule, built by `cascade.stage.build_schedule`.

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


# --- stage -----------------------------------------------------------------------------------------------------------

_BAND = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_MOST_BANDS = 1024


def _check_channels(value: str | tuple[str, ...]) -> None:
    """Raise ValueError for anything but a known name, or different names of bands."""
    if isinstance(value, str):
        if value not in NAMED:
            names = ", ".join(NAMED)
            raise ValueError(f"channels: {quoted(value)} is not one of {names}; bands are a list: [blue, green, nir]")
        return
    wrong = [band for band in value if not _BAND.fullmatch(band)]
    if wrong or not 1 <= len(value) <= _MOST_BANDS or len(set(value)) < len(value):
        reason = f"{quoted(wrong[0])} is not a name" if wrong else f"{len(value)} names, or two that are the same"
        raise ValueError(
            f"channels: {reason}; expected 1 to {_MOST_BANDS} different names of letters, digits, `_`, `.` and `-`"
        )


class MeasuredRange(Settings):
    """A range measured once, when training begins, over the values of the data; the stage then has it as numbers."""

    quantiles: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.001, 0.999)
    """Shares of the values that are below the lowest and below the highest value of the range."""


def _kind_of_range(value: Any) -> str | None:
    """Which of the three is meant; None if it is none of them."""
    if isinstance(value, (dict, MeasuredRange)):
        return "[measured]"
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if all(isinstance(one, (list, tuple)) for one in value):
        return "[pairs]"
    return "[pair]" if len(value) == 2 else None


Range: TypeAlias = (
    Annotated[
        Annotated[tuple[float, float], Tag("[pair]")]
        | Annotated[tuple[tuple[float, float], ...], Tag("[pairs]")]
        | Annotated[MeasuredRange, Tag("[measured]")],
        Discriminator(
            _kind_of_range,
            custom_error_type="range",
            custom_error_message="[low, high], one such pair for each channel, or {quantiles: [low, high]}",
        ),
    ]
    | None
)


class StageConfig(Settings):
    """One diffusion model of the cascade: network, noise, and what the network predicts. Saved as stage.json."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """The stage's name in per-stage options, such as `base`; also the name of its folder in a cascade."""
    resolution: Side
    """Default height and width of its pictures, in pixels."""
    low_resolution: Side | None = None
    """Super-resolution: size of the smaller picture that it enlarges. None: a base stage."""
    channels: str | tuple[str, ...] = "rgb"
    """Channels of its pictures: `rgb`, `gray`, `rgba` (with transparency), or the names of bands such as
    `[blue, green, red, nir]`; the same for all stages of a cascade."""
    values: ValueType = "uint8"
    """Type of the values in the data and in what is drawn."""
    range: Range = None
    """Values that become -1 and 1: `[0, 65535]`, one such pair for each band, or `quantiles` to measure. Values beyond
    are clipped. None: the whole range of the type."""
    path: Literal["picture", "residual"] = "picture"
    """The diffused variable: the picture, or (super-resolution) its difference from the upsampled smaller one."""
    residual_scale: Annotated[float, Field(gt=0)] = 1.0
    """`path: residual`: the difference is divided by this, which gives it about unit variance."""
    parameterization: Prediction = "eps"
    """The quantity that the network predicts."""
    schedule: ScheduleConfig = CosineSchedule()
    """Noise level as a function of time."""
    model: ModelConfig = UNetConfig()
    """The network."""
    conditions: dict[ConditionName, ConditionConfig] = Field(default_factory=dict)
    """What the stage reads in addition to text, by name; see conditions.md."""
    sampling: SamplingConfig = SamplingConfig()
    """Default settings for drawing."""
    presets: dict[Literal["fast", "best"], PresetConfig] = Field(default_factory=dict)
    """Named changes of `sampling`; `default` is `sampling` itself."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings that are newer than some stages and off, so that those stages' files stay the same."""
        values: dict[str, Any] = write(self)
        newer: dict[str, Any] = {"channels": "rgb", "values": "uint8", "range": None, "conditions": {}}
        return {name: value for name, value in values.items() if name not in newer or value != newer[name]}

    @model_validator(mode="after")
    def _consistent_conditions(self) -> Self:
        if self.conditions and not self.model.reads_conditions:
            raise ValueError(f"conditions: model.kind: {self.model.kind} reads text alone; choose unet or transformer")
        for name, config in self.conditions.items():
            if name in RESERVED:
                raise ValueError(
                    f"conditions: {name} has another meaning in prompt files and data; choose another name"
                )
            detail = config.resolution if isinstance(config, PictureCondition) else None
            if detail is not None and self.resolution % detail:
                raise ValueError(
                    f"conditions.{name}.resolution {detail} does not divide the stage's resolution {self.resolution}"
                )
        for name in self.sampling.guidance_of:
            if name not in self.guided:
                raise ValueError(
                    f"sampling.guidance_of: {name} is not read by this stage, but {', '.join(self.guided)}"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name in ("text_encoder", "cascade"):
            raise ValueError(f"name {self.name} is taken by another part of a cascade's folder; choose another")
        _check_channels(self.channels)
        self._check_range()
        if self.low_resolution is not None and self.low_resolution >= self.resolution:
            raise ValueError(f"low_resolution {self.low_resolution} must be smaller than resolution {self.resolution}")
        if self.low_resolution is not None and self.resolution % self.low_resolution:
            raise ValueError(f"resolution {self.resolution} is not a multiple of low_resolution {self.low_resolution}")
        if self.path == "residual" and self.low_resolution is None:
            raise ValueError("path: residual needs low_resolution, the smaller picture it differs from")
        needed = self.model.needs_schedule
        if needed not in (None, self.schedule.kind):
            raise ValueError(
                f"model.kind: {self.model.kind} needs schedule.kind: {needed}, on whose steps it was trained"
            )
        self.check_sampler(self.sampling.sampler)
        if self.resolution % self.geometry.divisor:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {self.geometry.divisor},"
                " the factor by which the model reduces it"
            )
        return self

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Raises ValueError for a sampler that needs a predicted variance if the stage's network predicts none."""
        if sampler.own.get("variance") == "learned" and not self.model.predicts_variance:
            raise ValueError(
                f"sampler.variance: learned needs a network that predicts it, which model.kind: {self.model.kind} does"
                " not; choose posterior, beta or between"
            )

    def _check_range(self) -> None:
        """Raise ValueError for a range that does not fit the channels and the type of values."""
        if self.range is None:
            if self.values == "float32":
                raise ValueError("values: float32 needs a range, such as [0, 1], or range.quantiles to measure one")
            return
        if self.channels == "rgba":
            raise ValueError("range: pictures with transparency have the whole range of their type; leave it out")
        if isinstance(self.range, MeasuredRange):
            low, high = self.range.quantiles
            if low >= high:
                raise ValueError(f"range.quantiles: {low:g} is not below {high:g}; give the lower one first")
            return
        limits, channels = _pairs(self.range), PictureFormat.of(self.channels).channels
        if len(limits) not in (1, channels):
            raise ValueError(f"range: {len(limits)} pairs for {channels} channels; give one, or one for each")
        most = {"uint8": 255, "uint16": 65535}.get(self.values)
        for low, high in limits:
            if low >= high:
                raise ValueError(f"range: {low:g} is not below {high:g}; give the lowest value first")
            if most is not None and not (low >= 0 and high <= most):
                raise ValueError(f"range: {low:g} to {high:g} is beyond values: {self.values}, 0 to {most}")

    @property
    def pictures(self) -> PictureFormat:
        """The format of its pictures, the only place that defines it; with the type's range until one is measured."""
        stated = self.range is not None and not isinstance(self.range, MeasuredRange)
        return PictureFormat.of(self.channels, self.values, _pairs(self.range) if stated else None)

    @property
    def guided(self) -> tuple[str, ...]:
        """The conditions on which guidance acts, in the order of `guidance_of`."""
        return (*self.conditions, *((TEXT,) if self.model.reads_text else ()))

    def detail(self, name: str) -> int:
        """How many times smaller than the stage's picture a picture condition is in its detail."""
        config = self.conditions[name]
        return self.resolution // (getattr(config, "resolution", None) or self.resolution)

    def undropped(self) -> Self:
        """The stage without dropout of conditions, for views that are measured or shown."""
        kept = {name: config.model_copy(update={"dropout": 0.0}) for name, config in self.conditions.items()}
        return self.model_copy(update={"conditions": kept})

    @property
    def geometry(self) -> Geometry:
        """The network's requirements on picture sizes, and its receptive field."""
        return self.model.geometry(self.pictures.channels)

    @property
    def scale(self) -> int:
        """Factor from the smaller picture to this one, 1 for a base stage."""
        return self.resolution // (self.low_resolution or self.resolution)


def _pairs(stated: object) -> tuple[tuple[float, float], ...]:
    """One pair, or one for each channel, as pairs."""
    assert isinstance(stated, tuple)
    return stated if isinstance(stated[0], tuple) else (stated,)


# --- stage.json ------------------------------------------------------------------------------------------------------

_READING = "text"
"""Key of stage.json that is not a setting of the stage: how its training read text, as in a run's section `text`."""


def save_stage(
    folder: str | Path,
    config: StageConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    reading: TextReading | None = None,
) -> None:
    """Write a stage folder: stage.json, the settings that rebuild it, and model.safetensors, as `dtype` if given.

    reading: how training read its text; stage.json records it if the network reads text.
    """
    noted = {} if reading is None or not config.model.reads_text else {_READING: reading.model_dump(mode="json")}
    with atomic_folder(folder) as temporary:
        write_json(temporary / "stage.json", {"format": FORMAT_VERSION, **config.model_dump(mode="json"), **noted})
        save_tensors(temporary / "model.safetensors", weights, dtype)


def read_stage_config(folder: str | Path) -> StageConfig:
    """The settings in a stage folder. Raises CascadeError for another format version or a wrong setting."""
    path = Path(folder) / "stage.json"
    data = read_json(path)
    check_format(path, data.pop("format", None))
    data.pop(_READING, None)
    return parse(StageConfig, data, str(path))


def read_stage_reading(folder: str | Path) -> TextReading | None:
    """How training read the stage's text, from its stage.json; None if an earlier version wrote the file."""
    path = Path(folder) / "stage.json"
    data = read_json(path)
    return parse(TextReading, data[_READING], f"{path}: {_READING}") if _READING in data else None
