"""How fast a stage trains on this machine: a few steps of the real training run, measured."""

from __future__ import annotations

import logging
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cascade.config.training import TrainConfig
from cascade.load.training import load_trainer
from cascade.memory import training_memory
from cascade.preflight import run_bytes

_ENTRIES, _STEPS_AN_ENTRY = 4, 2


@dataclass(frozen=True)
class Pace:
    """Measured speed and counted cost of a training run. seconds: of one step."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def measure(config: TrainConfig, scratch: Path) -> Pace:
    """Train a few steps in a folder that is deleted afterwards. The log's first entry, which warms up, is left out.

    Raises CascadeError for a run that cannot start on this machine.
    """
    steps = _ENTRIES * _STEPS_AN_ENTRY
    optimizer = config.training.optimizer.model_copy(update={"warmup_steps": 0, "decay_steps": 0})
    brief = {
        "steps": steps,
        "log_every": _STEPS_AN_ENTRY,
        "sample_every": 0,
        "validation": None,
        "optimizer": optimizer,
    }
    training = config.training.model_copy(update=brief)
    trial = config.model_copy(update={"output": str(scratch), "training": training})
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with _quiet():
            trainer = load_trainer(trial)
            trainer.run()
        assert trainer.log is not None
        rates = [entry["images_per_second"] for entry in trainer.log.entries[1:]]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    memory = training_memory(config).total
    return Pace(config.training.batch_size / statistics.median(rates), memory, run_bytes(config))


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines of the training run: it is none."""
    logger = logging.getLogger("cascade.training")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
