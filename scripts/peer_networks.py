"""The networks that bench_train.py compares, each with the same step: forward, square, backward, fused AdamW."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import count_gflop, once
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config.stage import SquaredCosineSchedule, StageConfig
from cascade.models.if_unet import IFUNetConfig
from cascade.stage import build_stage
from cascade.storage.diffusers import unet_settings
from cascade.training.optim import AdamW

Call = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class NetworkStep:
    """A training step of a network on one fixed batch. gflop: per picture, forward and backward."""

    name: str
    parameters: int
    gflop: float
    run: Callable[[], None]


def make_step(name: str, network: nn.Module, call: Call, gflop: float, dtype: torch.dtype) -> NetworkStep:
    """call: the network's forward pass on the batch."""
    network.train()
    optimizer = AdamW(network.parameters(), lr=1e-4, fused=True)
    device = next(network.parameters()).device.type

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = call(network).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return NetworkStep(name, sum(parameter.numel() for parameter in network.parameters()), gflop, run)


def our_step(
    config: StageConfig, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, gflop: float
) -> NetworkStep:
    """Our network of a base stage."""
    network = build_stage(config).to(device).network
    z, text = _inputs(config, batch, tokens, config.model.text_dim, device)
    level = torch.zeros(batch, 1, 1, 1, device=device)
    cond = Conditioning(text, torch.ones(batch, tokens, dtype=torch.bool, device=device))
    return make_step("cascade", network, lambda model: model(z, level, cond), gflop, dtype)


def diffusers_step(
    gflop: float, config: StageConfig, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> NetworkStep:
    """diffusers' UNet2DConditionModel in the shape of DeepFloyd IF's base stage, with about `gflop` per picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel

    def build(width: int) -> nn.Module:
        widths = tuple(width * factor for factor in (1, 2, 3, 4))
        model = IFUNetConfig(channels=widths, embedding_dim=4 * width, context_dim=4 * width, head_dim=32)
        shape = StageConfig(name="base", resolution=config.resolution, schedule=SquaredCosineSchedule(), model=model)
        return UNet2DConditionModel.from_config(unet_settings(shape))

    def call_on(count: int, where: torch.device) -> Call:
        z, text = _inputs(config, count, tokens, 4096, where)
        return lambda model: model(z, 500, encoder_hidden_states=text, return_dict=False)[0]

    return _closest("diffusers, IF's shape", build, call_on, (32, 64, 96, 128, 160, 192), gflop, batch, device, dtype)


def imagen_step(
    folder: Path, gflop: float, config: StageConfig, batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> NetworkStep:
    """imagen-pytorch's BaseUnet64, with about `gflop` per picture."""
    unet = _import_imagen(folder)

    def build(width: int) -> nn.Module:
        return unet(dim=width, text_embed_dim=768, num_resnet_blocks=2)

    def call_on(count: int, where: torch.device) -> Call:
        z, text = _inputs(config, count, tokens, 768, where)
        level = torch.zeros(count, device=where)
        mask = torch.ones(count, tokens, dtype=torch.bool, device=where)
        return lambda model: model(z, level, text_embeds=text, text_mask=mask)

    return _closest("imagen-pytorch", build, call_on, (32, 64, 96, 128, 160), gflop, batch, device, dtype)


def _closest(
    name: str,
    build: Callable[[int], nn.Module],
    call_on: Callable[[int, torch.device], Call],
    widths: tuple[int, ...],
    gflop: float,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> NetworkStep:
    """The network of the width with FLOPs nearest to `gflop`, in the faster of two memory layouts."""
    counted = {}
    with torch.device("meta"):  # counted without memory or time
        call = call_on(1, torch.device("meta"))
        for width in widths:
            network = build(width)
            counted[width] = count_gflop(lambda network=network: call(network).square().mean().backward())
            if counted[width] > gflop:
                break
    width = min(counted, key=lambda width: abs(counted[width] - gflop))
    call = call_on(batch, device)
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = make_step(name, build(width).to(device, memory_format=layout), call, counted[width], dtype)
        once(step.run)
        steps.append((min(once(step.run) for _ in range(2)), step))
    return min(steps, key=lambda pair: pair[0])[1]


def _import_imagen(folder: Path) -> Any:
    """BaseUnet64 alone, since importing the package downloads T5's config.

    Its __init__ and t5 are replaced by empty modules, as are torchvision and kornia, which only its sampler and trainer
    use.
    """
    sys.path.insert(0, str(folder))
    package = types.ModuleType("imagen_pytorch")
    package.__path__ = [str(folder / "imagen_pytorch")]
    text = types.ModuleType("imagen_pytorch.t5")
    text.__dict__.update(t5_encode_text=None, get_encoded_dim=lambda _name: 768, DEFAULT_T5_NAME="")
    stubs = {"imagen_pytorch": package, "imagen_pytorch.t5": text}
    for name in ("torchvision", "torchvision.transforms", "kornia", "kornia.augmentation"):
        stubs[name] = types.ModuleType(name)
    stubs["torchvision"].__dict__["transforms"] = stubs["torchvision.transforms"]
    stubs["kornia"].__dict__["augmentation"] = stubs["kornia.augmentation"]
    sys.modules.update(stubs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("imagen_pytorch.imagen_pytorch").BaseUnet64


def _inputs(config: StageConfig, batch: int, tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = config.resolution
    return torch.randn(batch, 3, size, size, device=device), torch.randn(batch, tokens, width, device=device)
