"""How much memory drawing and training take, counted on tensors without data before anything is loaded."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.build import build_stage
from cascade.conditioning import Conditioning
from cascade.config import StageConfig, TrainConfig
from cascade.models.winograd import Convolution
from cascade.stage import Stage

OVERHEAD_BYTES = 600_000_000
"""What Python, torch and its libraries take themselves, and workspaces of convolutions."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that exist at the same time while it is on: each storage from its making to its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it: on tensors without data torch would make the whole matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _KeptByAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _KeptByAttention(torch.autograd.Function):
    """Queries, keys, values and answer wait for the backward pass; the matrix is computed again."""

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
class StageMemory:
    """Bytes of a stage: its weights, and what one network call makes besides them at most.

    transformed: what convolutions hold beside their weights in float32 on a CPU, unless memory is to be spared.
    """

    weights: int
    activations: int
    transformed: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.activations


def stage_memory(config: StageConfig, pictures: int = 1, text_tokens: int = 77) -> StageMemory:
    """Memory in float32 of drawing `pictures` at once, with guidance where that is on, in the stage's own size."""
    stage = build_stage(config, device="meta")
    batch = pictures * (1 if config.sampling.guidance == 1 else 2)
    with torch.device("meta"), torch.inference_mode():
        picture = torch.zeros(batch, 3, config.resolution, config.resolution)
        level = torch.zeros(batch, 1, 1, 1)
        text = torch.zeros(batch, text_tokens, config.model.text_dim)
        cond = Conditioning(text, torch.ones(batch, text_tokens, dtype=torch.bool))
        if config.low_resolution is not None:
            cond = replace(cond, low_res=picture, low_res_log_snr=level)
        with LiveBytes() as live:
            stage.network(picture, level, stage.network.prepare(cond))
    convolutions = [module for module in stage.network.modules() if isinstance(module, Convolution)]
    transformed = sum(convolution.transformed_bytes() for convolution in convolutions)
    return StageMemory(weight_bytes(stage.network), live.peak, transformed)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step needs at least, on each device.

    weights: beside their gradients, the optimizer's memory and the average. activations: what the backward pass needs.
    """

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.activations


OPTIMIZER_COPIES = {"adamw": 2, "muon": 1, "adafactor": 0}
"""Numbers that an optimizer remembers for each weight, at least."""


def training_memory(config: TrainConfig, processes: int = 1, sharded: bool = False) -> TrainingMemory:
    """What a step of a run takes at least on each device: counted, without any, by a forward and a backward pass.

    sharded: the processes share out weights and all that belongs to them (FSDP). bfloat16 halves the activations.
    """
    training, stage = config.training, build_stage(config.stage, device="meta")
    stage.network.activation_checkpointing = training.activation_checkpointing
    pictures = max(training.batch_size // training.accumulation // processes, 1)
    weights = weight_bytes(stage.network)
    copies = 3 + OPTIMIZER_COPIES[training.optimizer.kind]  # the weight, its gradient, its average
    copies = 2 if training.lora_rank else copies  # the gradients and their memory are of low rank
    # Two sizes tell what grows with the pictures from the gradients, which do not.
    one, two = (_pass_peak(stage, config, count) for count in (1, 2))
    activations = (two - one) * pictures * (0.5 if training.precision != "fp32" else 1.0)
    return TrainingMemory(round(weights * copies / (processes if sharded else 1)), round(activations))


def _pass_peak(stage: Stage, config: TrainConfig, pictures: int) -> int:
    """Most bytes that a forward and backward pass makes on tensors without data."""
    size, tokens = config.data.crop or config.stage.resolution, config.text.max_length if config.text.padded else 1
    with torch.device("meta"):
        picture = torch.zeros(pictures, 3, size, size)
        level = torch.zeros(pictures, 1, 1, 1)
        text = torch.zeros(pictures, tokens, config.stage.model.text_dim)
        cond = Conditioning(text, torch.ones(pictures, tokens, dtype=torch.bool))
        if config.stage.low_resolution is not None:
            cond = replace(cond, low_res=picture, low_res_log_snr=level)
        with LiveBytes() as live, _FusedAttention():
            stage.network(picture, level, cond).square().mean().backward()
    stage.network.zero_grad(set_to_none=True)
    return live.peak


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@dataclass(frozen=True)
class Way:
    """A way to load a model: the arguments of `from_pretrained`, and the bytes that drawing then takes at most."""

    dtype: Literal["float32", "bfloat16"]
    low_memory: bool
    bytes: int

    @property
    def arguments(self) -> str:
        """What to give to `from_pretrained`."""
        return f"dtype={self.dtype!r}" + (", low_memory=True" if self.low_memory else "")


def ways(stages: Sequence[StageConfig], text_parameters: int, text_tokens: int, halved_text: bool) -> list[Way]:
    """Each way to load a model, largest first. halved_text: the text encoder follows the stages' number format.

    In bfloat16 all tensors have half the bytes, so one count serves both.
    """
    each = [stage_memory(config, text_tokens=text_tokens) for config in stages]
    found = []
    for dtype, share in (("float32", 1.0), ("bfloat16", 0.5)):
        text = 4 * text_parameters * (share if halved_text else 1.0)
        together = text + share * (sum(memory.weights for memory in each) + max(memory.activations for memory in each))
        if dtype == "float32" and not torch.cuda.is_available():
            together += sum(memory.transformed for memory in each)
        apart = max(text, *(share * memory.total for memory in each))
        for low_memory, total in ((False, together), (True, apart)):
            found.append(
                Way("float32" if dtype == "float32" else "bfloat16", low_memory, round(total) + OVERHEAD_BYTES)
            )
    return sorted(found, key=lambda way: -way.bytes)


def free_bytes() -> int:
    """Memory that a default device has left: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
