"""Which precision a run is in, where its settings leave that to the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from cascade.config.training import TrainConfig
from cascade.probe import Work, faster_format, warn_if_slow
from cascade.settings import read_yaml
from cascade.training.accelerator import from_main, launched_processes
from cascade.training.state import checkpoints

logger = logging.getLogger("cascade.training")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def settled(config: TrainConfig) -> TrainConfig:
    """The settings with a precision: for `auto` that which the run began with, else the fastest on this machine.

    One that was asked for stays; where it is slow, a line says how slow. All processes together.
    """
    state = launched_processes()
    training = config.training
    if training.precision != "auto":
        refused = training.precision == "fp16" and state.device.type == "cpu"  # in a moment, by the accelerator
        if state.is_main_process and training.precision != "fp32" and not refused:
            warn_if_slow([_work(config)], state.device, DTYPES[training.precision])
        return config
    chosen = from_main(state, lambda: _begun_in(config) or _NAMES[faster_format([_work(config)], state.device)])
    return config.model_copy(update={"training": training.model_copy(update={"precision": chosen})})


def _begun_in(config: TrainConfig) -> str | None:
    """The precision of the run in the folder, if one was begun there."""
    folder = Path(config.output)
    if not checkpoints(folder):
        return None
    known = read_yaml(folder / "config.yaml").get("training", {}).get("precision", "fp32")
    return None if known == "auto" else str(known)


def _work(config: TrainConfig) -> Work:
    training = config.training
    pictures = max(1, training.batch_size // training.accumulation // launched_processes().num_processes)
    return Work(config.stage, pictures, trained=True)
