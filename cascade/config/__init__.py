"""The settings of a stage and of a training run. What each builds is one hop away, in `cascade.build`."""

from cascade.bounds import PositiveInt
from cascade.config.common import FORMAT_VERSION, AugSpread, Fraction
from cascade.config.data import (
    Captions,
    DataConfig,
    FolderSource,
    HubSource,
    ParquetSource,
    ScenesSource,
    SourceConfig,
    TextConfig,
    TextReading,
    WebDatasetSource,
)
from cascade.config.network import ModelConfig
from cascade.config.noise import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    SquaredCosineSchedule,
)
from cascade.config.samplers import SamplerConfig, complete_sampler, with_sampler_section
from cascade.config.sampling import PresetConfig, SamplingConfig
from cascade.config.stage import StageConfig
from cascade.config.training import (
    EMAConfig,
    LogitNormalLevels,
    LossConfig,
    LowRankLayers,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
    UniformLevels,
    ValidationConfig,
)
from cascade.diffusion.parameterization import Kind
from cascade.models.if_unet import IFUNetConfig
from cascade.models.unet import UNetConfig

__all__ = [
    "FORMAT_VERSION",
    "AugSpread",
    "Captions",
    "ConstantSchedule",
    "CosineSchedule",
    "DataConfig",
    "EMAConfig",
    "FolderSource",
    "Fraction",
    "HubSource",
    "IFUNetConfig",
    "Kind",
    "LinearSchedule",
    "LogitNormalLevels",
    "LossConfig",
    "LowRankLayers",
    "ModelConfig",
    "OptimizerConfig",
    "ParquetSource",
    "PositiveInt",
    "PresetConfig",
    "SamplerConfig",
    "SamplingConfig",
    "ScenesSource",
    "ScheduleConfig",
    "SourceConfig",
    "SquaredCosineSchedule",
    "StageConfig",
    "TextConfig",
    "TextReading",
    "TrainConfig",
    "TrainingConfig",
    "UNetConfig",
    "UniformLevels",
    "ValidationConfig",
    "WebDatasetSource",
    "complete_sampler",
    "with_sampler_section",
]
