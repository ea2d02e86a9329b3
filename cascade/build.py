"""From settings to objects."""

from __future__ import annotations

import torch

from cascade.config.noise import ConstantSchedule, CosineSchedule, LinearSchedule, ScheduleConfig, SquaredCosineSchedule
from cascade.config.stage import StageConfig
from cascade.diffusion import schedules
from cascade.models.network import Network
from cascade.stage import Stage


def build_schedule(config: ScheduleConfig, resolution: int) -> schedules.NoiseSchedule:
    """The noise schedule of a stage of this resolution."""
    match config:
        case ConstantSchedule():
            return schedules.DiscreteSchedule(schedules.constant_betas(config.beta, config.steps))
        case LinearSchedule():
            return schedules.DiscreteSchedule(schedules.linear_betas(config.beta_start, config.beta_end, config.steps))
        case SquaredCosineSchedule():
            return schedules.DiscreteSchedule(schedules.squared_cosine_betas(config.steps, config.max_beta))
        case CosineSchedule():
            reference = config.reference_resolution
            shift = schedules.resolution_shift(resolution, reference) if reference else 0.0
            return schedules.CosineSchedule(shift, (config.log_snr_min, config.log_snr_max), config.offset)


def build_network(config: StageConfig) -> Network:
    """The network of a stage, with fresh weights."""
    channels = config.pictures.channels
    network = config.model.build(channels, 0 if config.low_resolution is None else channels)
    if config.conditions:  # last, so that they change none of the other fresh weights
        network.add_conditions(config.conditions)
    return network


def build_stage(config: StageConfig, device: torch.device | str = "cpu", seed: int = 0) -> Stage:
    """A stage with fresh weights that follow from `seed`; `device` may be "meta" to hold none at all."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        network = build_network(config)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Stage(config, network, build_schedule(config.schedule, config.resolution))
