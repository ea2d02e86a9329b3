"""How much memory drawing and training take, counted on tensors without data before anything is loaded."""

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

    transformed: what convolutions hold beside their weights on a CPU, unless memory is to be spared; by number format,
    each counted in its own.
    """

    weights: int
    activations: int
    transformed: Mapping[str, int]

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.activations


def stage_memory(config: StageConfig, pictures: int = 1, text_tokens: int = 77) -> StageMemory:
    """Memory in float32 of drawing `pictures` at once, with guidance where that is on, in the stage's own size."""
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
    """Bytes that a training step needs at least, on each device.

    weights: beside their gradients, the optimizer's memory and the average. activations: what the backward pass needs.
    text: the text encoder's weights, where they are known.
    """

    weights: int
    activations: int
    text: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.activations + self.text


def training_memory(config: TrainConfig, processes: int = 1, sharded: bool = False) -> TrainingMemory:
    """What a step of a run takes at least on each device: counted, without any, by a forward and a backward pass.

    sharded: the processes share out weights and all that belongs to them (FSDP). bfloat16 halves the activations.
    """
    training, stage = config.training, build_stage(config.stage, device="meta")
    stage.network.activation_checkpointing = training.activation_checkpointing
    pictures = max(training.batch_size // training.accumulation // processes, 1)
    trained = trained_bytes(config)
    weights = trained.whole + 2 * trained.learning + trained.optimizer  # their gradients and averages
    # Two sizes tell what grows with the pictures from the gradients, which do not.
    one, two = (_pass_peak(stage, config, count) for count in (1, 2))
    activations = (two - one) * pictures * (0.5 if training.precision != "fp32" else 1.0)
    weights = round(weights / (processes if sharded else 1))
    return TrainingMemory(weights, round(activations), _text_bytes(config.text))


def _text_bytes(config: TextConfig) -> int:
    """Of the text encoder's weights, as far as a look at a local folder tells; 0 where they may not be loaded at all.

    Not counted: the bundled one, which is small, and one on the hub, which may not be here yet.
    """
    folder = Path(config.encoder).expanduser()
    filled = config.cache is not None and (Path(config.cache) / "index.json").exists()
    if config.encoder == "bundled" or filled or not folder.is_dir():
        return 0
    return text_memory(folder, halved=True).bytes(getattr(torch, config.dtype))


def _pass_peak(stage: Stage, config: TrainConfig, pictures: int) -> int:
    """Most bytes that a forward and backward pass makes on tensors without data."""
    # A word and the end of the text at least: IF normalizes over the tokens, and of one token there is nothing to
    # normalize where a group has one channel.
    tokens = config.text.max_length if config.text.padded else 2
    with torch.device("meta"):
        z, level, cond = blank_call(config.stage, pictures, tokens, config.data.crop)
        with LiveBytes() as live, _FusedAttention():
            loss = stage.network(z, level, cond).square().mean()
            # Given the tensor itself, torch would turn the mode off meanwhile, and with activation checkpointing find
            # another attention when it computes again.
            torch.autograd.backward(get_gradient_edge(loss))
    stage.network.zero_grad(set_to_none=True)
    return live.peak


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of a run's weights.

    whole: of all, with differences of low rank. learning: of those that learn. optimizer: what that remembers of them,
    at least.
    """

    whole: int
    learning: int
    optimizer: int


def trained_bytes(config: TrainConfig) -> TrainedBytes:
    """Counted on a network without data."""
    training, network = config.training, build_stage(config.stage, device="meta").network
    if training.lora_rank:
        add_low_rank(network, training.lora_rank, training.lora_layers)
    freeze(network, training.frozen)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return TrainedBytes(
        whole=weight_bytes(network),
        learning=sum(parameter.numel() * parameter.element_size() for parameter in learning),
        optimizer=sum(optimizer_numbers(training.optimizer.kind, p) * p.element_size() for p in learning),
    )


def optimizer_numbers(kind: str, weight: Tensor) -> int:
    """How many numbers an optimizer remembers of a weight, at least."""
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
    """A text encoder in numbers.

    parameters: all. linear, rows: those that 8 bits hold in one byte each, and the rows of their matrices, each with a
    scale. largest: those of its largest tensor. halved: it follows the stages' number format; else it is float32.
    """

    parameters: int
    linear: int = 0
    rows: int = 0
    largest: int = 0
    halved: bool = False

    def bytes(self, dtype: torch.dtype, eight_bit: bool = False) -> int:
        """Of the weights beside stages in `dtype`."""
        number = self.number_bytes(dtype)
        if not eight_bit:
            return number * self.parameters
        return number * (self.parameters - self.linear) + self.linear + torch.float32.itemsize * self.rows

    def number_bytes(self, dtype: torch.dtype) -> int:
        """Of a number that is not in 8 bits."""
        return dtype.itemsize if self.halved else torch.float32.itemsize


_EIGHT_BIT = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.wi(_\d)?)\.weight$")
"""Weights of a T5 that 8 bits hold; transformers leaves `wo` as it is, whose inputs are too large for it."""


def text_memory(folder: Path, halved: bool) -> TextMemory:
    """Of the safetensors files of a text encoder; of a whole T5, its encoder."""
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
    """A way to load a model: the arguments of `from_pretrained`, and the bytes that drawing then takes at most.

    streamed: what `low_memory` does where a stage or the text encoder does not fit: layers are read from disk.
    """

    dtype: NumberFormat
    low_memory: bool
    bytes: int
    text_8bit: bool = False
    streamed: bool = False

    @property
    def arguments(self) -> str:
        """What to give to `from_pretrained`."""
        flags = {"low_memory": self.low_memory, "text_8bit": self.text_8bit}
        return ", ".join([f"dtype={self.dtype!r}", *(f"{name}=True" for name, on in flags.items() if on)])

    @property
    def description(self) -> str:
        """The arguments, and what they lead to."""
        return self.arguments + (" (layers read from disk: slow)" if self.streamed else "")


WORTH_SAVING = 0.95
"""A way to spare memory is one if it leaves at most this share of what the plainer way takes."""


def ways(stages: Sequence[StageConfig], text: TextMemory, text_tokens: int) -> list[Way]:
    """Each way to load a model that spares memory, largest first.

    In bfloat16 tensors have half the bytes, so one count of weights and activations serves both.
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
    """Stages and text encoder together, or with `low_memory` the largest of them."""
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
    """One layer at a time, of the text encoder, then of each stage."""
    number_format = getattr(torch, dtype)
    share = number_format.itemsize / torch.float32.itemsize
    stages = (share * (counted.largest + counted.memory.activations) for counted in each)
    total = max(text.number_bytes(number_format) * text.largest, *stages)
    return Way(dtype, True, round(total) + OVERHEAD_BYTES, streamed=True)
