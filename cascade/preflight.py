"""Checks before the first training step for reasons that would end the run later: too little disk or memory.

Other checks: `config` refuses settings that contradict each other, data sources report missing files when opened, and
the trainer refuses a batch that does not divide among the processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from cascade.config.training import TrainConfig
from cascade.errors import ShortageError, StorageError
from cascade.machine import free_bytes
from cascade.memory import TrainingMemory, trained_bytes, training_memory


def check_run(config: TrainConfig, processes: int = 1, sharded: bool = False) -> None:
    """Raises CascadeError for a run that cannot reach its end on this machine.

    processes: number that share the batch. sharded: they share the weights as well.
    """
    free = free_bytes() // _sharing_memory()  # before anything else: a faster process soon allocates its part
    check_disk(config)
    check_memory(config, training_memory(config, processes, sharded), free, processes)


def _sharing_memory() -> int:
    """Number of processes that share the free memory: 1 on a GPU; on a CPU all that were launched on the machine."""
    return 1 if torch.cuda.is_available() else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_disk(config: TrainConfig) -> None:
    """Raises StorageError when the checkpoints to keep, and the one being written, do not fit on the disk."""
    output = Path(config.output)
    folder = next(path for path in (output, *output.resolve().parents) if path.exists())
    needed = run_bytes(config)
    own = sum(path.stat().st_size for path in (output / "checkpoints").glob("*/*"))  # a resumed run replaces them
    free = shutil.disk_usage(folder).free + own
    if needed > free:
        kept = config.training.keep_checkpoints
        raise StorageError(
            f"output: {kept} checkpoints and one being written need {_gigabytes(needed)}, {folder} has"
            f" {_gigabytes(free)} free; lower training.keep_checkpoints or choose another output"
        )


def run_bytes(config: TrainConfig) -> int:
    """Upper bound on the size of a run's folder, without samples and log."""
    trained = trained_bytes(config)
    checkpoint = trained.whole + trained.learning + trained.optimizer
    adapter = trained.learning if config.training.lora_rank else 0
    # The old stage and adapter folders exist until the new ones are complete.
    return checkpoint * (config.training.keep_checkpoints + 1) + 2 * (trained.whole + adapter)


def check_memory(config: TrainConfig, memory: TrainingMemory, free: int, divisible: int = 1) -> None:
    """Raises ShortageError, with advice, when a step needs more than `free` bytes."""
    if memory.total <= free:
        return
    parts = [(memory.weights, "weights and optimizer"), (memory.activations, "activations")]
    parts += [(memory.text, "the text encoder")] if memory.text else []
    raise ShortageError(
        f"training.batch_size: a step needs at least {_gigabytes(memory.total)} of memory"
        f" ({', '.join(f'{_gigabytes(size)} for {what}' for size, what in parts)}), each process has"
        f" {_gigabytes(free)}; {_way_out(config, memory, free, divisible)}"
    )


def _way_out(config: TrainConfig, memory: TrainingMemory, free: int, processes: int) -> str:
    training = config.training
    if memory.text and memory.total - memory.text <= free:
        return "set text.cache=FOLDER and fill it with `cascade encode`, so that the encoder is not loaded"
    free -= memory.text
    if memory.weights >= free:
        return "use a smaller stage.model, or FSDP over several GPUs (docs/training-at-scale.md)"
    for accumulation in range(training.accumulation + 1, training.batch_size // processes + 1):
        fits = memory.weights + memory.activations * training.accumulation / accumulation <= free
        if fits and training.batch_size % (accumulation * processes) == 0:
            return f"set training.accumulation={accumulation}, which computes the same steps in smaller passes"
    if not training.activation_checkpointing:
        return "set training.activation_checkpointing=true"
    return "use a smaller stage.model or data.crop"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
