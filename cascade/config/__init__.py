"""The settings of a stage and of a training run. What each builds is one hop away, in `cascade.build`."""

from cascade.config.common import FORMAT_VERSION, AugSpread, Fraction, Kind, PositiveInt
from cascade.config.data import (
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
from cascade.config.network import IFUNetConfig, ModelConfig, UNetConfig
from cascade.config.noise import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    SquaredCosineSchedule,
)
from cascade.config.stage import PresetConfig, SamplingConfig, StageConfig
from cascade.config.training import (
    EMAConfig,
    LogitNormalLevels,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingConfig,
    UniformLevels,
    ValidationConfig,
)

__all__ = [
    "FORMAT_VERSION",
    "AugSpread",
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
    "ModelConfig",
    "OptimizerConfig",
    "ParquetSource",
    "PositiveInt",
    "PresetConfig",
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
]
