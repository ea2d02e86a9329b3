"""Seconds of one guided network call: ours against diffusers', the same network and weights, alternating.

    python scripts/bench_if.py [--model if-i-m] [--dtype float32] [--repeats 5] [--profile] [--compile]

Arithmetic is counted for diffusers' network, so a share may exceed 100 % where ours needs fewer multiplications.
Weights are random, of the published shapes; both outputs are compared before timing. Judge by the ratio of each
alternating pair, since another busy process slows both. `--profile` shows where our time goes.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cascade.conditioning import Conditioning
from cascade.config.stage import SquaredCosineSchedule, StageConfig
from cascade.models.if_unet import IF_NOISE, IFUNetConfig
from cascade.stage import build_stage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DConditionModel

from cascade.storage.diffusers import unet_settings

FIRST = {"name": "base", "resolution": 64}
SECOND = {"name": "sr256", "resolution": 256, "low_resolution": 64}
SIZES: Mapping[str, tuple[dict[str, Any], IFUNetConfig]] = {
    "if-i-m": (FIRST, IFUNetConfig()),
    "if-i-l": (FIRST, IFUNetConfig(channels=(320, 640, 960, 1280), embedding_dim=1280, context_dim=1280)),
    "if-ii-m": (
        SECOND,
        IFUNetConfig(
            channels=(128, 256, 512, 768, 768),
            blocks=(2, 2, 3, 4, 4),
            attention=(False, False, False, True, True),
            block_scale=1.41423,
        ),
    ),
    "tiny": (
        {"name": "base", "resolution": 16},
        IFUNetConfig(
            channels=(32, 64),
            blocks=(1, 1),
            attention=(False, True),
            embedding_dim=128,
            text_dim=64,
            context_dim=32,
            head_dim=16,
            pooling_heads=2,
        ),
    ),
}
STEP, NOISE_LEVEL = 500, 250


def stage_config(model: str) -> StageConfig:
    """The settings of a published stage."""
    size, network = SIZES[model]
    return StageConfig(**size, schedule=SquaredCosineSchedule(), model=network)


def level(step: int) -> Tensor:
    """Log SNR at a step, for the two halves of guidance."""
    return IF_NOISE.log_snr(torch.tensor([(step + 1) / 1000] * 2, dtype=torch.float64))[:, None, None, None]


def calls(
    config: StageConfig, dtype: torch.dtype, device: torch.device, compiled: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(ours, theirs): one guided step of each network; ours excludes values computed once per picture."""
    network = build_stage(config).to(device, dtype).network.eval().requires_grad_(False)
    theirs = UNet2DConditionModel.from_config(unet_settings(config)).to(device, dtype).eval()
    theirs.load_state_dict(network.state_dict())
    size, width = config.resolution, config.model.text_dim
    z, low = (torch.randn(2, 3, size, size, device=device) for _ in range(2))
    text = torch.randn(2, 77, width, device=device)
    mask = torch.ones(2, 77, dtype=torch.bool, device=device)
    enlarges = config.low_resolution is not None
    cond = Conditioning(text, mask, low if enlarges else None, level(NOISE_LEVEL).to(device) if enlarges else None)
    log_snr = level(STEP).to(device)
    prepared = network.prepare(cond.to(dtype=dtype))
    ours = torch.compile(network) if compiled else network
    peer = torch.compile(theirs) if compiled else theirs
    seen = (torch.cat([z, low], dim=1) if enlarges else z).to(dtype)
    labels = torch.tensor([NOISE_LEVEL] * 2, device=device) if enlarges else None
    text = text.to(dtype)
    return (
        lambda: ours(z, log_snr, prepared),
        lambda: peer(seen, STEP, encoder_hidden_states=text, class_labels=labels, return_dict=False)[0],
    )


def timed(action: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def convolution_peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of torch's convolution at a favourable shape, the reference of the shares."""
    convolution = torch.nn.Conv2d(384, 384, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    h = torch.randn(2, 384, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    convolution(h)
    seconds = min(timed(lambda: convolution(h)) for _ in range(5))
    return 2 * 2 * 32 * 32 * 9 * 384 * 384 / seconds / 1e9


def where_time_goes(action: Callable[[], Tensor]) -> str:
    """Shares of the kinds of operation."""
    kinds = {"convolution": 0.0, "norm": 0.0, "linear": 0.0, "attention": 0.0, "gelu": 0.0, "rest": 0.0}
    names = {
        "convolution": ("conv",),
        "norm": ("group_norm", "layer_norm"),
        "linear": ("addmm", "linear", "aten::mm"),
        "attention": ("scaled_dot", "flash", "softmax", "bmm"),
        "gelu": ("gelu",),
    }
    with torch.profiler.profile() as profile:
        action()
    for event in profile.key_averages():
        kind = next((kind for kind, parts in names.items() if any(part in event.key for part in parts)), "rest")
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        kinds[kind] += own
    total = sum(kinds.values())
    return ", ".join(f"{kind} {100 * share / total:.0f} %" for kind, share in kinds.items())


@click.command()
@click.option("--model", type=click.Choice(list(SIZES)), default="if-i-m", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile both.")
@click.option("--profile", is_flag=True, help="Show where our time goes.")
@torch.inference_mode()
def main(model: str, dtype: str, repeats: int, device: str, compiled: bool, profile: bool) -> None:
    """Compare and print."""
    torch.manual_seed(0)
    config = stage_config(model)
    ours, theirs = calls(config, getattr(torch, dtype), torch.device(device), compiled)
    first = ours().float()  # also warms up
    with FlopCounterMode(display=False) as counter:
        second = theirs().float()
    difference = float((first - second).abs().max() / second.abs().max())
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    mine, peers = (statistics.median(times) for times in zip(*pairs, strict=True))
    gflop = counter.get_total_flops() / 1e9
    ratios = [peer / own for own, peer in pairs]
    peak = convolution_peak(getattr(torch, dtype), torch.device(device))
    click.echo(
        f"{model} {dtype}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}: ours {mine:.2f} s"
        f" ({100 * gflop / mine / peak:.0f} % of the convolution peak of {peak:.0f} GFLOP/s), diffusers {peers:.2f} s"
        f" ({100 * gflop / peers / peak:.0f} %),"
        f" {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f});"
        f" outputs differ by {difference:.1e}"
    )
    if profile:
        click.echo(where_time_goes(ours))
        click.echo(f"diffusers: {where_time_goes(theirs)}")


if __name__ == "__main__":
    main()
