"""The cost of a stage in weights, memory and arithmetic, and the memory that drawing takes, counted without data."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cascade.conditioning import Conditioning
from cascade.conditions.values import blank
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import StageConfig
from cascade.files.paths import one_variant
from cascade.files.tensors import stored_shapes
from cascade.models.convolution import Convolution
from cascade.stage import Stage, build_stage, calls_at_once

# --- stage -----------------------------------------------------------------------------------------------------------


def blank_call(
    config: StageConfig, pictures: int, text_tokens: int, side: int | None = None
) -> tuple[Tensor, Tensor, Conditioning]:
    """Arguments of a call of a stage's network, all zeros, for counting its cost: (z, log SNR, conditions).

    side: height and width of the pictures, default the stage's own. On the default device, such as `meta`.
    """
    side = side or config.resolution
    z, level = torch.zeros(pictures, config.pictures.channels, side, side), torch.zeros(pictures, 1, 1, 1)
    text = torch.zeros(pictures, text_tokens, config.model.text_dim)
    given = blank(config.conditions, pictures, (side, side))
    cond = Conditioning(text, torch.ones(pictures, text_tokens, dtype=torch.bool), given=given)
    return z, level, cond if config.low_resolution is None else replace(cond, low_res=z, low_res_log_snr=level)


def count_parameters(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- cost ------------------------------------------------------------------------------------------------------------
# The cost of a stage in weights, memory and arithmetic, counted before anything is drawn or trained.

_WHOLE_TENSORS = 3
"""Tensors of picture size that every sampler holds: noisy picture, estimate, enlarged smaller picture."""
_MAPS_AT_ONCE = 96
"""Approximate number of feature maps of the finest level that are alive together in a network call, in float32."""


@dataclass(frozen=True)
class StageCost:
    """The costs that follow from a stage's settings alone; used by preflight, `info`, batch sizes and memory checks."""

    config: StageConfig

    @cached_property
    def stage(self) -> Stage:
        """The stage with weights on torch's `meta` device, which holds no data."""
        return build_stage(self.config, device="meta")

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return count_parameters(self.stage.network)

    @property
    def steps(self) -> int:
        """Sampling steps per picture with the stage's own settings."""
        return self.stage.count_steps()

    def calls(self, settings: SamplingConfig | None = None) -> int:
        """Network calls per picture: one per evaluation of the denoiser, two where guidance acts."""
        settings = settings or self.config.sampling
        evaluated = self.stage.evaluations(settings)
        guided = calls_at_once(self.config, settings)
        if guided == 1:
            return len(evaluated)
        low, high = settings.guidance_interval or (-math.inf, math.inf)
        return sum(guided if low <= level <= high else 1 for level in evaluated)

    def flops_per_call(self, text_tokens: int) -> int:
        """Multiplications and additions of one network call for one picture of the stage's own size.

        text_tokens: length of the text, to which every prompt is padded.
        """
        with torch.device("meta"), torch.inference_mode():
            z, level, cond = blank_call(self.config, 1, text_tokens)
            prepared = self.stage.network.prepare(cond)
            with FlopCounterMode(display=False) as counter:
                self.stage.network(z, level, prepared)
        return int(counter.get_total_flops())

    def least_bytes(self, size: tuple[int, int], dtype: torch.dtype, tile: int | None = None) -> float:
        """Lower bound on the memory to draw a picture of `size`, whole or in square tiles of side `tile`."""
        geometry, at_once = self.config.geometry, math.prod(size)
        if tile is not None:
            at_once = min(at_once, (tile + 2 * (geometry.receptive_radius or 0)) ** 2)
        picture = self.config.pictures.channels * _WHOLE_TENSORS * math.prod(size) * torch.float32.itemsize
        return picture + at_once * geometry.least_activations * dtype.itemsize

    def likely_bytes(self, size: tuple[int, int]) -> float:
        """Approximate memory to draw a picture of `size`."""
        return math.prod(size) * self.config.geometry.finest_width * _MAPS_AT_ONCE * torch.float32.itemsize


# --- memory ----------------------------------------------------------------------------------------------------------

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
