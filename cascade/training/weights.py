"""The weights of a run: those that learn, low-rank differences, their moving average, shards over processes."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cascade.config.training import EMAConfig, LowRankKind, LowRankLayers
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import atomic_folder
from cascade.files.tensors import check_names, load_tensors, save_tensors
from cascade.models.blocks import Normalize
from cascade.models.network import Network

# --- lora ------------------------------------------------------------------------------------------------------------
# Low-rank adaptation: weights are frozen, and layers train a small difference, saved separately or merged.
#
# Source: Hu et al. (2021) arXiv 2106.09685, implemented by peft, an optional extra; in peft's folder layout, so that
# adapters can be exchanged with other programs. Other forms of the difference: Kalajdzievski (2023) arXiv 2312.03732,
# Liu et al. (2024) arXiv 2402.09353, Yeh et al. (2024) arXiv 2309.14859.

_BASE, _DOWN, _UP = ".base_layer.", "lora_A.default.weight", "lora_B.default.weight"
_LENGTHS = "lora_magnitude_vector.default.weight"
_PREFIX = "base_model.model."  # peft's name for the network
_OF_ADAPTER = re.compile(r"^(.*)\.((?:lora|lokr)_.*)$")
"""A layer's name and that of a tensor of its adapter."""


def add_low_rank(
    network: Network, rank: int, layers: LowRankLayers = "attention", seed: int = 0, kind: LowRankKind = "lora"
) -> None:
    """Freeze all weights of a network and add a trainable difference of this rank, at first zero, to some layers.

    layers: the linear layers of attention, or all linear and convolutional layers.
    """
    peft = _peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(kind, rank, _names(network, layers)), network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in network.named_parameters():
        if kind == "dora" and _OF_ADAPTER.match(name):  # peft looks at its kernels as rows
            parameter.data = parameter.data.contiguous()


def merged(weights: Mapping[str, Tensor], kind: LowRankKind = "lora") -> dict[str, Tensor]:
    """Named weights with their differences added, under the network's original names."""
    plain, of_layers = {}, _of_layers(weights)
    for name, weight in weights.items():
        if _OF_ADAPTER.match(name):
            continue
        layer, wrapped, part = name.partition(_BASE)
        if wrapped and part == "weight":
            weight = _adapted(weight, of_layers[layer], kind)
        plain[f"{layer}.{part}" if wrapped else name] = weight
    return plain


def _of_layers(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer's adapter, by their names there."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if match := _OF_ADAPTER.match(name):
            found.setdefault(match[1], {})[match[2]] = weight
    return found


def _adapted(weight: Tensor, own: Mapping[str, Tensor], kind: LowRankKind) -> Tensor:
    """A layer's weight (out, in, ...) with the difference of its adapter."""
    if kind == "lokr":
        return weight + torch.kron(*(_factor(own, name) for name in ("lokr_w1", "lokr_w2"))).reshape(weight.shape)
    down, up = own[_DOWN], own[_UP]
    difference = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if kind == "rslora":
        return weight + math.sqrt(len(down)) * difference
    if kind == "dora":
        turned = (weight + difference).flatten(1)
        lengths = own[_LENGTHS].flatten() / torch.linalg.vector_norm(turned, dim=1)
        return (lengths[:, None] * turned).reshape(weight.shape)
    return weight + difference


def _factor(own: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor of the Kronecker product as a matrix: stored whole, or as a product of low rank."""
    whole = own.get(f"{name}.default")
    return own[f"{name}_a.default"] @ own[f"{name}_b.default"].flatten(1) if whole is None else whole.flatten(1)


def save_adapter(folder: Path, weights: Mapping[str, Tensor], rank: int, kind: LowRankKind = "lora") -> None:
    """Write only the differences, in peft's folder layout: adapter_config.json and adapter_model.safetensors."""
    own = {_stored(name): weight for name, weight in weights.items() if _OF_ADAPTER.match(name)}
    with atomic_folder(folder) as temporary:
        _peft_config(kind, rank, list(_of_layers(weights)), inference=True).save_pretrained(temporary)
        save_tensors(temporary / "adapter_model.safetensors", own)


def _stored(name: str) -> str:
    """A parameter's name in peft's file."""
    return _PREFIX + (name.removesuffix(".weight") if name.endswith(_LENGTHS) else name).replace(".default", "")


def merge_adapter(network: nn.Module, folder: Path, scale: float = 1.0) -> None:
    """Add the differences of an adapter's folder, times `scale`, to a network's weights.

    Raises CascadeError when the adapter is missing, damaged, made for another network, or lacks a tensor, which peft
    would leave at random values.
    """
    peft = _peft()
    if not (folder / "adapter_config.json").is_file():
        raise CascadeError(f"{folder}: no adapter here; name a folder with adapter_config.json")
    stored = load_tensors(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    names = {match[1] for match in map(_OF_ADAPTER.match, tensors) if match}
    unknown = sorted(names - dict(network.named_modules()).keys())
    if unknown:
        raise CascadeError(f"{folder}: was made for another network, which has {unknown[0]}")
    try:
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(folder)), network)
        check_names(peft.get_peft_model_state_dict(network), tensors, f"{folder}: ")
        peft.set_peft_model_state_dict(network, tensors)
        # Layer by layer: peft's own `merge_and_unload` requires the config of a language model.
        for name, layer in list(network.named_modules()):
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.scale_layer(scale)
                layer.merge()
                network.set_submodule(name, layer.get_base_layer())
        del network.peft_config  # else peft takes the next adapter for a second one beside the merged
    except CascadeError:
        raise
    except Exception as error:  # peft raises exceptions of many types for settings and shapes that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CascadeError(f"{folder}: does not fit this network: {reason}") from error


def _names(network: Network, layers: LowRankLayers) -> list[str]:
    """Dotted names of the adapted layers."""
    if layers == "all":  # but readers of conditions, which are trained themselves
        named = ((name, layer) for name, layer in network.named_modules() if not name.startswith("conditions."))
        return [name for name, layer in named if isinstance(layer, nn.Linear | nn.Conv2d)]
    attends = {layer for part in network.attention_layers() for layer in part.modules()}
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and layer in attends]


def _peft_config(kind: LowRankKind, rank: int, names: list[str], inference: bool = False) -> Any:
    """peft's settings with alpha = rank: the difference is the product of its parts, for `rslora` times sqrt(rank)."""
    peft, shared = _peft(), {"r": rank, "target_modules": names, "inference_mode": inference}
    if kind == "lokr":
        return peft.LoKrConfig(alpha=rank, **shared)
    return peft.LoraConfig(lora_alpha=rank, use_rslora=kind == "rslora", use_dora=kind == "dora", **shared)


def _peft() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, and it warns of missing kernels
    try:
        import peft  # late, because it imports transformers
    except ImportError:
        raise CascadeError("low-rank adaptation needs peft: pip install 'cascade-diffusion[peft]'") from None
    return peft


# --- frozen ----------------------------------------------------------------------------------------------------------
# Freezing parts of a network by name.


def freeze(network: nn.Module, patterns: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Disable the gradients of all weights whose name, or the name of a module around them, matches a pattern.

    `levels.0` is a module and everything in it, `*.attention` every module of that name, `*.bias` every bias. trained:
    patterns of weights that get gradients nevertheless. Raises CascadeError for a pattern that matches nothing, and
    when nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for setting, each, learns in (("frozen", patterns, False), ("trained", trained, True)):
        for pattern in each:
            matched = [name for name in parameters if any(fnmatchcase(part, pattern) for part in _around(name))]
            if not matched:
                raise CascadeError(
                    f"training.{setting}: {quoted(pattern)} matches no weight; {_near(pattern, list(parameters))}"
                )
            for name in matched:
                parameters[name].requires_grad_(learns)
    if patterns:
        for module in network.modules():
            if isinstance(module, Normalize | nn.GroupNorm):
                module.register_forward_pre_hook(_with_gradient)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise CascadeError(f"training.frozen: {list(patterns)} leaves nothing to train; name fewer parts")


def _with_gradient(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A norm's input marked to require a gradient, although nothing before it is trained.

    Otherwise the backward pass of GroupNorm on a channels-last picture crashes the process (torch 2.13 on a CPU: it
    writes the gradient that is not required).
    """
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _around(name: str) -> list[str]:
    """`levels.0.down.weight` -> `levels`, `levels.0`, `levels.0.down`, and itself."""
    steps = name.split(".")
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def _near(pattern: str, names: Sequence[str]) -> str:
    parts = list(dict.fromkeys(part for name in names for part in _around(name)))
    close = difflib.get_close_matches(pattern, parts, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the parts are {', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"


# --- sharding --------------------------------------------------------------------------------------------------------
# Sharded weights: under FSDP every process holds a part of each weight, but files hold whole weights.
#
# All processes gather a whole tensor together, so nothing here may be called by the main process alone.


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(
    tensors: Mapping[str, Tensor], keep: bool = True, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The full tensors by name, on `device` if given; {} if `keep` is False, for processes that only participate.

    Gathered one at a time, so that at most one full tensor is on the device in addition to the kept ones.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.to(device) if device is not None else full
    return gathered


def spread_like(own: Tensor, value: Tensor) -> Tensor:
    """This process' part of `value`, sharded like `own`; `value` itself if `own` is whole.

    If `value` has length 1 in the sharded dimension, every process holds all of it. Every process has read the same
    file, so nothing is sent.
    """
    if not isinstance(own, DTensor):
        return value
    placements = [
        Replicate() if isinstance(place, Shard) and value.shape[place.dim] != own.shape[place.dim] else place
        for place in own.placements
    ]
    return distribute_tensor(value.to(own.device), own.device_mesh, placements, src_data_rank=None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


# --- ema -------------------------------------------------------------------------------------------------------------
# Moving average of the weights, which draws better than the current weights.


class EMA:
    """Exponential moving average in float32 of the trained weights, with a half-life in pictures instead of steps.

    A run with twice the batch size thus averages over the same data (Karras et al. 2024, sec. 3). Frozen weights, which
    may be most of a network, need no average.
    """

    def __init__(self, network: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.weights = {name: value.float().clone() for name, value in _learning(network).items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at the step after which `images_seen` pictures have been seen."""
        half_life = float(self.config.half_life_images)
        if self.config.warmup:
            half_life = min(half_life, 0.2 * images_seen)
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Add the current weights to the average."""
        fresh = [weight.float() for weight in _learning(network).values()]
        share = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.weights.values()), fresh, share)

    @torch.no_grad()
    def distance(self, network: nn.Module) -> float:
        """Distance of the average from the trained weights, relative to their norm. All processes together.

        Computed one weight at a time, so that only one difference is in memory.
        """
        weights = _learning(network).values()
        apart = _norm(weight.float() - mean for weight, mean in zip(weights, self.weights.values(), strict=True))
        return apart / max(_norm(weight.float() for weight in weights), 1e-12)

    def of_all(self, network: nn.Module) -> dict[str, Tensor]:
        """The average of every weight, in the network's order; for frozen ones the weight itself."""
        return {name: self.weights.get(name, value.detach()) for name, value in network.named_parameters()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a saved average, which may hold more than the trained weights."""
        for name, value in self.weights.items():
            value.copy_(spread_like(value, weights[name]))


def _learning(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return float(torch.stack([whole(torch.linalg.vector_norm(tensor)) for tensor in tensors]).norm())
