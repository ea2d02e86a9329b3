"""A stage's network on one device: construction, block-wise compilation, non-blocking calls, small weight files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError
from cascade.files.tensors import load_tensors, load_weights
from cascade.models.conditioned import Seen
from cascade.models.unet import Block, UNet
from cascade.stage import build_stage

MOST_BYTES = 15 * 2**20
"""Most bytes of one weight file, for transfers limited to 16 MiB per file."""


def network(stage: StageConfig, device: torch.device, compiled: bool = False) -> UNet:
    """A new network of the stage; compiled: each block by itself, 20 to 60 s for all shapes of a stage on an H200."""
    net = build_stage(stage, device="cpu", seed=0).network
    assert isinstance(net, UNet)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        for module in net.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    return net


@torch.no_grad()
def fill(net: UNet, weights: Sequence[Tensor]) -> None:
    """Copy weights into the network, in the order of its parameters, from any device and number format."""
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        parameter.copy_(weight)


def with_weights(stage: StageConfig, device: torch.device, weights: Sequence[Tensor]) -> UNet:
    """A network that draws. weights: in the order of its parameters."""
    net = network(stage, device).eval()
    fill(net, weights)
    return net


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bf16 where the device supports it; disabled elsewhere."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def call(net: UNet, z: Tensor, log_snr: Tensor, cond: Conditioning) -> Tensor:
    """The network's output, (B, 3, H, W) float32.

    Like `net(z, log_snr, cond)`, but without reading whether the mask is all True, for which the host would wait.
    """
    assert net.text_norm is not None
    assert net.text_pooling is not None
    with autocast(z.device):
        text = net.text_norm(cond.text)
        embedding = net.text_pooling(text, cond.text_mask)
        if net.aug_level is not None:
            embedding = embedding + net.aug_level(cond.low_res_log_snr)
        read = tuple(net.read_text(text))
        output: Tensor = net(z, log_snr, Seen(embedding, read, cond.text_mask[:, None, None, :], cond.low_res))
        return output.float()


def write_parts(weights: Mapping[str, Tensor], out: Path, name: str) -> None:
    """Write <out>/<name>-0.safetensors, -1, ...: bf16, each below 16 MiB, replacing an older set of that name."""
    out.mkdir(parents=True, exist_ok=True)
    sets: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in weights.items():
        half = value.detach().to("cpu", torch.bfloat16).contiguous()
        if size and size + half.nbytes > MOST_BYTES:
            sets.append({})
            size = 0
        sets[-1][key] = half
        size += half.nbytes
    for number, own in enumerate(sets):
        temporary = out / f"{name}-{number}.tmp"
        save_file(own, temporary)
        temporary.replace(out / f"{name}-{number}.safetensors")
    for left in _parts(out, name)[len(sets) :]:  # of an older set with more files
        left.unlink()


def read_parts(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the files of `write_parts`, in no particular order. Raises CascadeError for a folder without such files."""
    files = _parts(folder, name)
    if not files:
        raise CascadeError(f"{folder}: holds no {name}-*.safetensors; name a folder that `train` wrote")
    return {key: value for file in files for key, value in load_tensors(file).items()}


def read_weights(folder: Path, name: str, stage: StageConfig) -> list[Tensor]:
    """Read the files of `write_parts` as float32, in the order of the parameters of the stage's network.

    Raises CascadeError for a folder without such files and for weights of other settings.
    """
    net = build_stage(stage, device="meta").network
    load_weights(net, read_parts(folder, name), folder / f"{name}-*.safetensors")
    return [parameter.detach() for parameter in net.parameters()]


def _parts(folder: Path, name: str) -> list[Path]:
    """The files of one set in the order in which they were written."""
    named = re.compile(rf"{re.escape(name)}-(\d+)\.safetensors")
    found = [(int(match[1]), file) for file in folder.iterdir() if (match := named.fullmatch(file.name))]
    return [file for _, file in sorted(found)]
