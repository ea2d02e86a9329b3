"""Estimates of the memory that drawing and training take, counted on tensors without data before anything is loaded."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.build import build_stage
from cascade.config.data import TextConfig
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.files.variants import one_variant
from cascade.models.convolution import Convolution
from cascade.stage import Stage, blank_call
from cascade.streaming import stored_shapes
from cascade.training.adafactor import remembered_numbers
from cascade.training.frozen import freeze
from cascade.training.lora import add_low_rank

NumberFormat = Literal["float32", "bfloat16"]

OVERHEAD_BYTES = 600_000_000
"""Memory of Python, torch and its libraries themselves, and of workspaces of convolutions."""


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of tensors that exist together: each storage from its creation to its release."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages it created."""
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
class StageMemory:
    """Bytes of a stage's weights, and the most that one network call allocates in addition.

    transformed: transformed weights that convolutions on a CPU keep, unless memory is scarce; by number format, each
    counted in that format.
    """

    weights: int
    activations: int
    transformed: Mapping[str, int]

    @property
    def total(self) -> int:
        """Weights and activations together."""
        return self.weights + self.activations


def stage_memory(config: StageConfig, pictures: int = 1, text_tokens: int = 77) -> StageMemory:
    """float32 memory to draw `pictures` at once at the stage's own size, with guidance where it is on."""
    stage = build_stage(config, device="meta")
    batch = pictures * (1 if config.sampling.guidance == 1 else 2)
    with torch.device("meta"), torch.inference_mode():
        z, level, cond = blank_call(config, batch, text_tokens)
        with LiveBytes() as live:
            stage.network(z, level, stage.network.prepare(cond))
    convolutions = [module for module in stage.network.modules() if isinstance(module, Convolution)]
    transformed = {
        dtype: sum(convolution.transformed_bytes(getattr(torch, dtype)) for convolution in convolutions)
        for dtype in get_args(NumberFormat)
    }
    return StageMemory(weight_bytes(stage.network), live.peak, transformed)


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
        add_low_rank(network, training.lora_rank, training.lora_layers)
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
        case _:
            return 2 * weight.numel()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@dataclass(frozen=True)
class TextMemory:
    """The size of a text encoder.

    parameters: all weights. linear, rows: the weights that 8-bit storage holds in one byte each, and the rows of their
    matrices, each with a scale. largest: weights of the largest tensor. halved: it has the stages' number format; else
    float32.
    """

    parameters: int
    linear: int = 0
    rows: int = 0
    largest: int = 0
    halved: bool = False

    def bytes(self, dtype: torch.dtype, eight_bit: bool = False) -> int:
        """Bytes of the weights when the stages are in `dtype`."""
        number = self.number_bytes(dtype)
        if not eight_bit:
            return number * self.parameters
        return number * (self.parameters - self.linear) + self.linear + torch.float32.itemsize * self.rows

    def number_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a number that is not stored in 8 bits."""
        return dtype.itemsize if self.halved else torch.float32.itemsize


_EIGHT_BIT = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.wi(_\d)?)\.weight$")
"""Weights of a T5 that are stored in 8 bits; transformers leaves out `wo`, whose inputs are too large."""


def text_memory(folder: Path, halved: bool) -> TextMemory:
    """The size of a text encoder, read from its safetensors files; of a whole T5, the encoder's part."""
    files = list(folder.glob("*.safetensors"))
    shapes: dict[str, list[int]] = {}
    for path in one_variant(files):
        shapes |= stored_shapes(path)
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name.startswith(("shared.", "encoder."))}
    linear = [name for name in sizes if _EIGHT_BIT.search(name)]
    return TextMemory(
        parameters=sum(sizes.values()),
        linear=sum(sizes[name] for name in linear),
        rows=sum(shapes[name][0] for name in linear),
        largest=max(sizes.values(), default=0),
        halved=halved,
    )


@dataclass(frozen=True)
class Way:
    """A way to load a model: arguments of `from_pretrained`, and an upper bound on the bytes that drawing then takes.

    streamed: `low_memory` reads layers from disk, because a stage or the text encoder does not fit.
    """

    dtype: NumberFormat
    low_memory: bool
    bytes: int
    text_8bit: bool = False
    streamed: bool = False

    @property
    def arguments(self) -> str:
        """The arguments as Python source."""
        flags = {"low_memory": self.low_memory, "text_8bit": self.text_8bit}
        return ", ".join([f"dtype={self.dtype!r}", *(f"{name}=True" for name, on in flags.items() if on)])

    @property
    def description(self) -> str:
        """The arguments, with a note if drawing will be slow."""
        return self.arguments + (" (layers read from disk: slow)" if self.streamed else "")


WORTH_SAVING = 0.95
"""A way is listed only if it takes at most this share of the memory of the previous, simpler one."""


def ways(stages: Sequence[StageConfig], text: TextMemory, text_tokens: int) -> list[Way]:
    """Ways to load a model, from the most memory to the least.

    bfloat16 tensors have half the bytes, so one count of weights and activations serves both formats.
    """
    each = [_counted(config, text_tokens) for config in stages]
    found: list[Way] = []
    for dtype in get_args(NumberFormat):
        for low_memory in (False, True):
            plain = _way(dtype, low_memory, False, each, text)
            eight = _way(dtype, low_memory, True, each, text)
            found += [plain, eight] if eight.bytes < WORTH_SAVING * plain.bytes else [plain]
        streamed = _streamed_way(dtype, each, text)
        found += [streamed] if streamed.bytes < WORTH_SAVING * found[-1].bytes else []
    return sorted(found, key=lambda way: -way.bytes)


@dataclass(frozen=True)
class _Counted:
    """A stage's memory, and the bytes of its largest weight, in float32."""

    memory: StageMemory
    largest: int


def _counted(config: StageConfig, text_tokens: int) -> _Counted:
    weights = build_stage(config, device="meta").network.parameters()
    largest = max(parameter.numel() * parameter.element_size() for parameter in weights)
    return _Counted(stage_memory(config, text_tokens=text_tokens), largest)


def _way(
    dtype: NumberFormat,
    low_memory: bool,
    text_8bit: bool,
    each: Sequence[_Counted],
    text: TextMemory,
) -> Way:
    """Memory of all stages and the text encoder together, or with `low_memory` of the largest of them."""
    number_format = getattr(torch, dtype)
    share = number_format.itemsize / torch.float32.itemsize
    stages, words = [counted.memory for counted in each], text.bytes(number_format, text_8bit)
    if low_memory:
        total = max(words, *(share * memory.total for memory in stages))
    else:
        weights = sum(memory.weights for memory in stages)
        total = words + share * (weights + max(memory.activations for memory in stages))
        if not torch.cuda.is_available():
            total += sum(memory.transformed[dtype] for memory in stages)
    return Way(dtype, low_memory, round(total) + OVERHEAD_BYTES, text_8bit)


def _streamed_way(dtype: NumberFormat, each: Sequence[_Counted], text: TextMemory) -> Way:
    """Memory of one layer at a time, of the text encoder, then of each stage."""
    number_format = getattr(torch, dtype)
    share = number_format.itemsize / torch.float32.itemsize
    stages = (share * (counted.largest + counted.memory.activations) for counted in each)
    total = max(text.number_bytes(number_format) * text.largest, *stages)
    return Way(dtype, True, round(total) + OVERHEAD_BYTES, streamed=True)
