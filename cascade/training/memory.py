"""The memory and disk space that a run needs, counted before its first step."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from cascade.config.data import TextConfig
from cascade.config.training import TrainConfig
from cascade.errors import ShortageError, StorageError
from cascade.resources.memory import LiveBytes, blank_call, text_memory, weight_bytes
from cascade.stage import Stage, build_stage
from cascade.system.device import free_bytes
from cascade.training.optim import remembered_numbers
from cascade.training.weights import add_low_rank, freeze

# --- memory ----------------------------------------------------------------------------------------------------------


class _FusedAttention(TorchFunctionMode):
    """Attention with the memory of fused kernels: on tensors without data torch would create the whole matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _KeptByAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _KeptByAttention(torch.autograd.Function):
    """Keeps queries, keys, values and output for the backward pass, which recomputes the matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, answer)
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004 - only their sizes matter
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@dataclass(frozen=True)
class TrainingMemory:
    """Lower bound on the bytes of a training step, per device.

    weights: weights, gradients, optimizer state and average. activations: tensors kept for the backward pass.
    text: the text encoder's weights, if known.
    """

    weights: int
    activations: int
    text: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.weights + self.activations + self.text


def training_memory(config: TrainConfig, processes: int = 1, sharded: bool = False) -> TrainingMemory:
    """Lower bound on the memory of a step per device: counted by a forward and a backward pass on tensors without data.

    sharded: the processes share the weights and everything of their size (FSDP). bfloat16 halves the activations.
    """
    training, stage = config.training, build_stage(config.stage, device="meta")
    stage.network.activation_checkpointing = training.activation_checkpointing
    pictures = max(training.batch_size // training.accumulation // processes, 1)
    trained = trained_bytes(config)
    weights = trained.whole + 2 * trained.learning + trained.optimizer  # twice: gradients and averages
    # Passes of two sizes separate activations, which grow with the pictures, from gradients, which do not.
    one, two = (_pass_peak(stage, config, count) for count in (1, 2))
    activations = (two - one) * pictures * (0.5 if training.precision != "fp32" else 1.0)
    weights = round(weights / (processes if sharded else 1))
    weights += 0 if training.distill is None else trained.whole  # the teacher, taken to be as large, in each process
    return TrainingMemory(weights, round(activations), _text_bytes(config.text))


def _text_bytes(config: TextConfig) -> int:
    """Bytes of the text encoder's weights if a local folder shows them; 0 if the run may only need cached embeddings.

    Also 0 for the bundled encoder, which is small, and for one on the hub, which may not be downloaded yet.
    """
    folder = Path(config.encoder).expanduser()
    filled = config.cache is not None and (Path(config.cache) / "index.json").exists()
    if config.encoder == "bundled" or filled or not folder.is_dir():
        return 0
    return text_memory(folder, halved=True).bytes(getattr(torch, config.dtype))


def _pass_peak(stage: Stage, config: TrainConfig, pictures: int) -> int:
    """Peak bytes of a forward and backward pass on tensors without data."""
    # At least two tokens (a word and the end of the text): IF normalizes over the tokens, which fails for a single
    # token where a group has one channel.
    tokens = config.text.max_length if config.text.padded else 2
    with torch.device("meta"):
        z, level, cond = blank_call(config.stage, pictures, tokens, config.data.crop)
        with LiveBytes() as live, _FusedAttention():
            loss = stage.network(z, level, cond).square().mean()
            # If given the tensor itself, torch would turn the mode off meanwhile, and activation checkpointing would
            # then recompute a different attention.
            torch.autograd.backward(get_gradient_edge(loss))
    stage.network.zero_grad(set_to_none=True)
    return live.peak


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of a run's weights.

    whole: all weights, low-rank adapters included. learning: trainable weights. optimizer: lower bound on its state.
    """

    whole: int
    learning: int
    optimizer: int


def trained_bytes(config: TrainConfig) -> TrainedBytes:
    """Counts the bytes of a run's weights on a network without data."""
    training, network = config.training, build_stage(config.stage, device="meta").network
    if training.lora_rank:
        add_low_rank(network, training.lora_rank, training.lora_layers, kind=training.lora_kind)
    freeze(network, training.frozen, training.trained)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return TrainedBytes(
        whole=weight_bytes(network),
        learning=sum(parameter.numel() * parameter.element_size() for parameter in learning),
        optimizer=sum(optimizer_numbers(training.optimizer.kind, p) * p.element_size() for p in learning),
    )


def optimizer_numbers(kind: str, weight: Tensor) -> int:
    """Numbers that an optimizer stores for a weight, at least."""
    match kind:
        case "adafactor":
            return remembered_numbers(weight)
        case "muon":
            return weight.numel()
        case "prodigy":
            return 4 * weight.numel()
        case _:
            return 2 * weight.numel()


# --- preflight -------------------------------------------------------------------------------------------------------
# Checks before the first training step for reasons that would end the run later: too little disk or memory.
#
# Other checks: `config` refuses settings that contradict each other, data sources report missing files when opened,
# and the trainer refuses a batch that does not divide among the processes.


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
