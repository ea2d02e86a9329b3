"""What would end a run later, found before its first step: too little disk, too little memory.

Settings that contradict each other are refused by `config` when they are read; data sources by their opening; a batch
that does not divide among the processes by the trainer.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cascade.build import build_stage
from cascade.config import TrainConfig
from cascade.errors import CascadeError
from cascade.memory import OPTIMIZER_COPIES, TrainingMemory, free_bytes, training_memory, weight_bytes


def check_run(config: TrainConfig, processes: int = 1, sharded: bool = False) -> None:
    """Raises CascadeError for a run that cannot reach its end on this machine.

    processes: that share the batch; sharded: and the weights.
    """
    check_disk(config)
    memory = training_memory(config, processes, sharded)
    check_memory(config, memory, free_bytes(), processes)


def check_disk(config: TrainConfig) -> None:
    """Raises CascadeError when the checkpoints to be kept, and the one being written, do not fit on the disk."""
    output = Path(config.output)
    folder = next(path for path in (output, *output.resolve().parents) if path.exists())
    needed = run_bytes(config)
    own = sum(path.stat().st_size for path in (output / "checkpoints").glob("*/*"))  # a resumed run replaces them
    free = shutil.disk_usage(folder).free + own
    if needed > free:
        kept = config.training.keep_checkpoints
        raise CascadeError(
            f"output: {kept} checkpoints and one being written need {_gigabytes(needed)}, {folder} has"
            f" {_gigabytes(free)} free; lower training.keep_checkpoints or choose another output"
        )


def run_bytes(config: TrainConfig) -> int:
    """The most that a run's folder holds at once, without samples and log."""
    weights = weight_bytes(build_stage(config.stage, device="meta").network)
    copies = 2 + (0 if config.training.lora_rank else OPTIMIZER_COPIES[config.training.optimizer.kind])
    stage_folders = 2  # the old one stays until the new one is there
    return weights * (copies * (config.training.keep_checkpoints + 1) + stage_folders)


def check_memory(config: TrainConfig, memory: TrainingMemory, free: int, divisible: int = 1) -> None:
    """Raises CascadeError when a step needs more than `free` bytes, and says what would make it fit."""
    if memory.total <= free:
        return
    raise CascadeError(
        f"training.batch_size: a step needs at least {_gigabytes(memory.total)} of memory ({_gigabytes(memory.weights)}"
        f" for weights and optimizer, {_gigabytes(memory.activations)} for activations), there are {_gigabytes(free)};"
        f" {_way_out(config, memory, free, divisible)}"
    )


def _way_out(config: TrainConfig, memory: TrainingMemory, free: int, processes: int) -> str:
    training = config.training
    if memory.weights >= free:
        return "use a smaller stage.model, or FSDP over several GPUs (docs/training-at-scale.md)"
    for accumulation in range(training.accumulation + 1, training.batch_size // processes + 1):
        fits = memory.weights + memory.activations * training.accumulation / accumulation <= free
        if fits and training.batch_size % (accumulation * processes) == 0:
            return f"set training.accumulation={accumulation}, which gives the same steps in smaller passes"
    if not training.activation_checkpointing:
        return "set training.activation_checkpointing=true"
    return "use a smaller stage.model or data.crop"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
