"""Which number format a machine computes a stage faster in: measured once, in under a second, and remembered.

Processors without bfloat16 instructions, such as Intel's for desktops and AMD's before Zen 4, emulate it, and take
several times as long as in float32; others take half. No list of processors is reliable, so this module measures.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import operator
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade import system
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.files.atomic import read_json, write_json
from cascade.models.convolution import one_generation
from cascade.resources.memory import blank_call
from cascade.stage import build_stage
from cascade.system.device import choose_dtype, has_bfloat16, name_of

logger = logging.getLogger("cascade.load")

GAIN = 0.9
"""Another format is chosen only if it takes at most this share of float32's time, because it rounds more."""
SLOW = 1.2
"""A requested format that takes at least this multiple of float32's time causes a warning."""
_LAYERS = 2  # those with the most arithmetic
_OPERATIONS = 1e8  # in a forward pass of a layer: about a millisecond
_REPEATS = 5
_SECONDS = 0.25  # for a layer
_TEXT_TOKENS = 16
_REMEMBERED = 200


@dataclass(frozen=True)
class Work:
    """The work to measure: a stage, the number of pictures per call, and whether it is trained."""

    config: StageConfig
    pictures: int = 2
    trained: bool = False


def faster_format(work: Sequence[Work], device: torch.device) -> torch.dtype:
    """float32 or bfloat16, whichever computes these stages faster; on a GPU, bfloat16 if it supports that natively."""
    if device.type != "cpu":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    share = time_share(work, device, torch.bfloat16)
    chosen = torch.bfloat16 if share <= GAIN else torch.float32
    logger.info("numbers are %s: bfloat16 takes %.2g of float32's time here", _plain(chosen), share)
    return chosen


def warn_if_slow(work: Sequence[Work], device: torch.device, dtype: torch.dtype) -> None:
    """Warn if a requested format takes longer than float32, and how much longer."""
    share = time_share(work, device, dtype)
    if share >= SLOW:
        _warn_once(f"{_plain(dtype)} takes {share:.1f} times as long as float32 on {name_of(device)}")


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def settled_dtype(dtype: torch.dtype | str | None, device: torch.device, configs: Iterable[StageConfig]) -> torch.dtype:
    """The number format to draw in: the requested one, the fastest for `auto`, the device's usual one for None.

    Raises CascadeError for a format that does not exist, or that the device does not support.
    """
    if dtype == "auto":
        return faster_format([Work(config) for config in configs], device)
    chosen = choose_dtype(dtype, device)
    if dtype is not None and chosen != torch.float32 and _may_be_slow(device):
        warn_if_slow([Work(config) for config in configs], device, chosen)
    return chosen


def explained(device: torch.device, configs: Iterable[StageConfig]) -> str:
    """The device and number format in which a cascade would be drawn, and the reason."""
    usual = _plain(choose_dtype(None, device))
    if device.type != "cpu":
        reason = "supports bfloat16" if has_bfloat16(device) else "does not support bfloat16"
        return f"drawn on {name_of(device)} in {usual}: it {reason}"
    share = time_share([Work(config) for config in configs], device, torch.bfloat16)
    fastest = "bfloat16" if share <= GAIN else "float32"
    long = f"{share:.2g} of its time" if share < 1 else f"{share:.2g} times as long"
    why = f"bfloat16 takes {long} here, so --dtype auto takes {fastest}"
    return f"drawn on the processor, since torch sees no GPU, in {usual}; {why}"


def time_share(work: Sequence[Work], device: torch.device, dtype: torch.dtype) -> float:
    """Time of the largest layers of some stages relative to float32. The result is stored per machine."""
    key = _key(work, device, dtype)
    known = _remembered()
    if key not in known:
        known[key] = _measured([layer for part in work for layer in _largest(part)], device, dtype)
        _remember(known)
    return known[key]


# --- measuring


@dataclass(frozen=True)
class _Layer:
    """A layer without data, the shape of its input, its operations for that input, and how often it occurs."""

    module: nn.Module
    shape: tuple[int, ...]
    operations: float
    trained: bool
    places: int = 1

    def cut(self) -> tuple[int, ...]:
        """The shape reduced in rows or pictures to about `_OPERATIONS`."""
        share = min(1.0, _OPERATIONS / self.operations)
        first = max(1, round(self.shape[0] * share))
        if first > 1 or len(self.shape) < 3:
            return (first, *self.shape[1:])
        axis = 2 if len(self.shape) == 4 else 1
        rows = max(4, round(self.shape[axis] * self.shape[0] * share))
        return (1, *self.shape[1:axis], min(rows, self.shape[axis]), *self.shape[axis + 1 :])


def _largest(work: Work) -> list[_Layer]:
    """The layers that make up most of a stage's arithmetic, each kind once."""
    found: dict[tuple[Any, ...], _Layer] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        operations = 2.0 * output.numel() * weight[0].numel()
        shape = tuple(inputs[0].shape)
        key = (type(module).__name__, tuple(weight.shape), shape)
        places = found[key].places + 1 if key in found else 1
        found[key] = _Layer(module, shape, operations, work.trained, places)

    network = build_stage(work.config, device="meta").network
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.device("meta"), torch.no_grad():
        z, level, cond = blank_call(work.config, work.pictures, _TEXT_TOKENS)
        network(z, level, cond)
    return sorted(found.values(), key=lambda layer: -layer.operations * layer.places)[:_LAYERS]


def _measured(layers: Sequence[_Layer], device: torch.device, dtype: torch.dtype) -> float:
    """Mean relative time of the layers, weighted by their operations.

    On one thread: several threads wait for each other while other programs run, which hides the difference.
    """
    weights = [layer.operations * layer.places for layer in layers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shares = [_share(layer, device, dtype) for layer in layers]
    finally:
        torch.set_num_threads(threads)
    return round(sum(map(operator.mul, weights, shares)) / sum(weights), 3)


def _share(layer: _Layer, device: torch.device, dtype: torch.dtype) -> float:
    """Relative time of a layer: the shortest of a few calls in each format, alternating."""
    plain, other = (_calls(layer, device, form) for form in (torch.float32, dtype))
    start, pairs = time.perf_counter(), [(next(plain), next(other))]
    while len(pairs) < 1 + _REPEATS and (len(pairs) < 2 or time.perf_counter() - start < _SECONDS):
        pairs.append((next(plain), next(other)))
    usual, asked = map(min, zip(*pairs[1:], strict=True))  # without the first calls, which include set-up
    return asked / usual


def _calls(layer: _Layer, device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Seconds of a layer's forward pass, and of its backward pass if it is trained."""
    module = copy.deepcopy(layer.module).to_empty(device=device)
    for weight in module.parameters():
        nn.init.uniform_(weight, -0.1, 0.1)
    module.to(dtype).requires_grad_(layer.trained)
    x = torch.randn(layer.cut(), device=device).to(dtype)
    if x.dim() == 4:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_(layer.trained)
    while True:
        yield _seconds(module, x, layer.trained)


def _seconds(module: nn.Module, x: Tensor, trained: bool) -> float:
    with nullcontext() if trained else torch.no_grad(), one_generation(module):
        start = time.perf_counter()
        y = module(x)
        if trained:
            y.sum().backward()
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
        return time.perf_counter() - start


def _may_be_slow(device: torch.device) -> bool:
    """Whether measuring is worth its time: GPUs with native bfloat16 compute float16 as fast."""
    return device.type == "cpu" or (device.type == "cuda" and not has_bfloat16(device))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- remembering


def _key(work: Sequence[Work], device: torch.device, dtype: torch.dtype) -> str:
    """Key of a stored result: another machine, torch version or stage may have another result."""
    machine = name_of(device) if device.type == "cuda" else _processor()
    parts = [(part.config.model, part.config.resolution, part.pictures, part.trained) for part in work]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return f"{machine}, torch {torch.__version__}, {_plain(dtype)}, {digest}"


@cache
def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return f"{next(names, platform.machine())} {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _memory_file() -> Path:
    return system.cache_folder() / "cascade" / "number-formats.json"


def _remembered() -> dict[str, float]:
    with suppress(CascadeError, RuntimeError):  # file missing or damaged, or no home folder
        return {key: float(value) for key, value in read_json(_memory_file()).items()}
    return {}


def _remember(shares: dict[str, float]) -> None:
    with suppress(CascadeError, OSError, RuntimeError):  # home folder not writable: measured again next time
        write_json(_memory_file(), dict(list(shares.items())[-_REMEMBERED:]))
