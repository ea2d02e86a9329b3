"""Low-rank adaptation: weights are frozen, and layers train a small difference, saved separately or merged.

Source: Hu et al. (2021) arXiv 2106.09685, implemented by peft, an optional extra; in peft's folder layout, so that
adapters can be exchanged with other programs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.checkpoint import atomic_folder, check_names, load_tensors, save_tensors
from cascade.config.training import LowRankLayers
from cascade.errors import CascadeError
from cascade.models.network import Network

_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_PREFIX = "base_model.model."  # peft's name for the network


def add_low_rank(network: Network, rank: int, layers: LowRankLayers = "attention", seed: int = 0) -> None:
    """Freeze all weights of a network and add a trainable difference of this rank, at first zero, to some layers.

    layers: the linear layers of attention, or all linear and convolutional layers.
    """
    peft = _peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(rank, _names(network, layers)), network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named weights with their differences added, under the network's original names."""
    plain = {}
    for name, weight in weights.items():
        if name.endswith((_DOWN, _UP)):
            continue
        layer, wrapped, part = name.partition(_BASE)
        if wrapped and part == "weight":
            down, up = weights[layer + _DOWN], weights[layer + _UP]
            weight = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        plain[f"{layer}.{part}" if wrapped else name] = weight
    return plain


def save_adapter(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write only the differences, in peft's folder layout: adapter_config.json and adapter_model.safetensors."""
    names = [name.removesuffix(_DOWN) for name in weights if name.endswith(_DOWN)]
    rank = len(weights[names[0] + _DOWN])
    own = {_PREFIX + name.replace(".default.", "."): weights[name] for name in weights if name.endswith((_DOWN, _UP))}
    with atomic_folder(folder) as temporary:
        _peft_config(rank, names, inference=True).save_pretrained(temporary)
        save_tensors(temporary / "adapter_model.safetensors", own)


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
    names = {name.rpartition(".lora_")[0] for name in tensors}
    unknown = sorted(names - dict(network.named_modules()).keys())
    if unknown:
        raise CascadeError(f"{folder}: was made for another network, which has {unknown[0]}")
    try:
        peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(folder)), network)
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


def _peft_config(rank: int, names: list[str], inference: bool = False) -> Any:
    """peft's settings with alpha = rank: the difference is up @ down, without a factor."""
    return _peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=names, inference_mode=inference)


def _peft() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it, and it warns of missing kernels
    try:
        import peft  # late, because it imports transformers
    except ImportError:
        raise CascadeError("low-rank adaptation needs peft: pip install 'cascade-diffusion[peft]'") from None
    return peft
