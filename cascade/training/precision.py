"""The precision of a run whose settings say `auto`."""

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
    """The settings with `auto` replaced by the precision that the run began with, or the fastest on this machine.

    An explicit precision stays; if it is slow, a line reports how slow. All processes together.
    """
    state = launched_processes()
    training = config.training
    if training.precision != "auto":
        refused = training.precision == "fp16" and state.device.type == "cpu"  # the accelerator will refuse it
        if state.is_main_process and training.precision != "fp32" and not refused:
            warn_if_slow([_work(config)], state.device, DTYPES[training.precision])
        return config
    chosen = from_main(state, lambda: _begun_in(config) or _NAMES[faster_format([_work(config)], state.device)])
    return config.model_copy(update={"training": training.model_copy(update={"precision": chosen})})


def _begun_in(config: TrainConfig) -> str | None:
    """The precision of the run in the output folder, if there is one."""
    folder = Path(config.output)
    if not checkpoints(folder):
        return None
    known = read_yaml(folder / "config.yaml").get("training", {}).get("precision", "fp32")
    return None if known == "auto" else str(known)


def _work(config: TrainConfig) -> Work:
    training = config.training
    pictures = max(1, training.batch_size // training.accumulation // launched_processes().num_processes)
    return Work(config.stage, pictures, trained=True)
