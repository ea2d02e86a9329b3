"""A stage folder -> its settings, its weights, and the stage itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cascade import deepfloyd, machine
from cascade.build import build_stage
from cascade.checkpoint import load_tensors, load_weights, read_stage_config
from cascade.config.stage import StageConfig
from cascade.files.paths import path_of
from cascade.load.adapters import Adapter
from cascade.models.convolution import Convolution
from cascade.slots import StageSlot
from cascade.stage import Stage
from cascade.streaming import stored_bytes, stream


def read_config(folder: str | Path) -> StageConfig:
    """The settings of a stage folder: cascade's, or DeepFloyd IF's in diffusers' layout."""
    return deepfloyd.read_stage(folder) if deepfloyd.is_diffusers(folder) else read_stage_config(folder)


def read_weights(folder: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The network's weights in a stage folder, and the file or folder that holds them."""
    folder = Path(folder)
    if deepfloyd.is_diffusers(folder):
        return deepfloyd.read_weights(folder), folder / "unet"
    path = folder / "model.safetensors"
    return load_tensors(path), path


def load_stage(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: Sequence[Adapter] = (),
) -> Stage:
    """A stage from its folder (stage.json and model.safetensors, or diffusers' layout), ready to draw.

    The network is built on the meta device, then filled, so that the weights exist once. adapters: low-rank adapters
    to add to them.
    """
    folder = path_of(folder)
    stage = build_stage(read_config(folder), device="meta")
    load_weights(stage.network, *read_weights(folder))
    for adapter in adapters:
        from cascade.training.lora import merge_adapter  # imports peft, an extra

        merge_adapter(stage.network, adapter.folder, adapter.scale)
    stage.network.eval().requires_grad_(False)
    return stage.to(device, dtype)


def slot_of(
    folder: Path, device: torch.device, dtype: torch.dtype, low_memory: bool, adapters: Sequence[Adapter]
) -> StageSlot:
    """The slot of a stage in a pipeline: loaded now, or (low_memory) for its turn."""
    if low_memory:
        slot = StageSlot(read_config(folder), lambda: _load_sparing(folder, device, dtype, adapters))
    else:
        slot = StageSlot.holding(load_stage(folder, device, dtype, adapters))
    return replace(slot, adapters={adapter.digest: adapter.scale for adapter in adapters})


def _load_sparing(folder: Path, device: torch.device, dtype: torch.dtype, adapters: Sequence[Adapter]) -> Stage:
    """Load without the transformed kernels that would be faster; stream from disk what does not fit.

    An adapter is added to weights in memory, so with an adapter nothing is streamed.
    """
    diffusers = deepfloyd.is_diffusers(folder)
    files = deepfloyd.weight_files(folder) if diffusers else [folder / "model.safetensors"]
    if not adapters and not fits(files, dtype, device):
        stage = build_stage(read_config(folder), device="meta")
        stage.network.eval().requires_grad_(False).to(dtype)
        stream(stage.network, files, device)
    else:
        stage = load_stage(folder, device, dtype, adapters)
    for module in stage.network.modules():
        if isinstance(module, Convolution):
            module.spare_memory = True
    return stage


def fits(files: Sequence[Path], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights leave a fifth of a device's free memory for the rest."""
    return stored_bytes(files, dtype) < 0.8 * machine.free_bytes(device)
