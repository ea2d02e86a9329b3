"""A training step: pictures per second, share of the convolution peak, data wait, memory; comparison with peers.

    python scripts/bench_train.py [CONFIG]... [--set KEY=VALUE]... [--steps 10] [--optimizers adamw,muon]
    python scripts/bench_train.py --peers [--imagen FOLDER] [CONFIG]

The first form runs the real trainer, each variant in a separate process: with and without activation checkpointing,
and with each optimizer. Pictures are drawn scenes unless --set names other data; text embeddings are random, so that
no encoder runs. FLOPs are those of the forward and backward pass, counted by torch, without checkpointing's
recomputation.

The second form takes our network, diffusers' UNet2DConditionModel in the shape of DeepFloyd IF and, from a FOLDER
made by `pip install --no-deps --target FOLDER imagen-pytorch einops beartype`, imagen-pytorch's Unet: forward, square,
backward, fused AdamW as the trainer has it, alternating. Peers get the width whose FLOPs are next to ours, and the
faster memory layout.

The peak is measured in the same run, before and after. With `--datasheet GFLOPS`, a GPU's dense peak in the run's
number format as its maker states it, the share is model FLOPs utilization (MFU; Chowdhery et al. 2022) instead. The
load is printed: measure on a quiet machine.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click
import torch
from measure import convolution_peak, count_gflop, load_average, once, peak_memory
from peer_networks import NetworkStep, diffusers_step, imagen_step, our_step

from cascade.cli.train import find_config
from cascade.conditioning import Conditioning, TextEmbeddings
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.stage import build_stage
from cascade.storage.training import load_train_config
from cascade.system.device import choose_device
from cascade.system.process import keep_freed_memory
from cascade.training.accelerator import DTYPES, settled

TOKENS = 16
"""Tokens per caption, about as in real captions."""


class RandomText:
    """Embeddings of captions without an encoder."""

    fingerprint = "random"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:  # noqa: ARG002 - the protocol's
        return TextEmbeddings.from_rows([torch.randn(TOKENS, self.dim) for _ in prompts])

    def to(self, device: object = None) -> Self:  # noqa: ARG002 - the protocol's
        return self

    def release(self) -> None:
        """Do nothing: there are no weights."""


@dataclass(frozen=True)
class Measured:
    """A run of the trainer: rates in its second half, peak gigabytes."""

    images_per_second: float
    data_wait_share: float
    gigabytes: float


def run_trainer(config: TrainConfig) -> Measured:
    """Run twice `log_every` steps; the first half warms up. Call in a separate process."""
    from cascade.training.trainer import Trainer

    keep_freed_memory()  # like `cascade train`
    torch.manual_seed(0)
    assert Trainer(config, build_stage(config.stage), RandomText(config.stage.model.text_dim)).run()
    entries = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    cuda = torch.cuda.is_available()
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_memory()
    return Measured(entries[-1]["images_per_second"], entries[-1]["data_wait_share"], gigabytes)


def pass_gflop(config: StageConfig, crop: int | None) -> float:
    """GFLOP of one picture, forward and backward, counted on the meta device."""
    size = crop or config.resolution
    network = build_stage(config, device="meta").network
    with torch.device("meta"):
        picture, level = torch.zeros(1, 3, size, size), torch.zeros(1, 1, 1, 1)
        mask = torch.ones(1, TOKENS, dtype=torch.bool)
        low = (picture, level) if config.low_resolution is not None else (None, None)
        cond = Conditioning(torch.zeros(1, TOKENS, config.model.text_dim), mask, *low)
        return count_gflop(lambda: network(picture, level, cond).square().mean().backward())


def settings(config: str, changes: Sequence[str], steps: int, folder: str) -> TrainConfig:
    """A short run of a config on drawn scenes, without periodic actions."""
    brief = [
        f"output={folder}/run",
        f"training.steps={2 * steps}",
        f"training.log_every={steps}",
        f"training.save_every={2 * steps}",
        *("training.sample_every=0", "training.trackers=[]", "training.validation=null", "training.init_from=null"),
        *("training.optimizer.warmup_steps=0", "training.optimizer.decay=constant", "training.optimizer.decay_steps=0"),
        *("text.encoder=bundled", "text.cache=null", "data.sources=[{kind: scenes}]", "data.tiles=false"),
    ]
    return load_train_config(find_config(config), [*brief, *changes])


def trainer_table(
    configs: Sequence[str], changes: Sequence[str], steps: int, optimizers: Sequence[str], datasheet: float | None
) -> None:
    """A line for each config, optimizer, and with and without activation checkpointing."""
    share = "of conv peak" if datasheet is None else "MFU"
    print(f"| stage | optimizer | checkpointing | images/s | GFLOP/image | GFLOP/s | {share} | data wait | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for config, optimizer, checkpointing in itertools.product(configs, optimizers, (False, True)):
        variant = [f"training.optimizer.kind={optimizer}", f"training.activation_checkpointing={checkpointing}"]
        with tempfile.TemporaryDirectory() as folder:
            run = settings(config, [*changes, *variant], steps, folder)
            peak = datasheet or machine_peak(run)
            # A new process: what earlier variants left in memory would count for this one.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measured = pool.submit(run_trainer, run).result()
            peak = datasheet or max(peak, machine_peak(run))
        gflop = pass_gflop(run.stage, run.data.crop)
        rate = gflop * measured.images_per_second
        print(
            f"| {config} | {optimizer} | {'yes' if checkpointing else 'no'} | {measured.images_per_second:.1f}"
            f" | {gflop:.1f} | {rate:.0f} | {rate / peak:.0%} of {peak:.0f} | {measured.data_wait_share:.1%}"
            f" | {measured.gigabytes:.2f} |",
            flush=True,
        )


def peer_table(config: TrainConfig, imagen: Path | None, repeats: int) -> None:
    """The same step in networks of similar size, alternating, so that another busy process slows all of them."""
    device, dtype = choose_device(None), DTYPES[settled(config).training.precision]
    batch, ours = config.training.batch_size, pass_gflop(config.stage, None)
    steps: list[NetworkStep] = [our_step(config.stage, batch, TOKENS, device, dtype, ours)]
    steps.append(diffusers_step(ours, config.stage, batch, TOKENS, device, dtype))
    if imagen is not None:
        steps.append(imagen_step(imagen, ours, config.stage, batch, TOKENS, device, dtype))
    peak = convolution_peak(device, dtype)
    for step in steps:
        step.run()
    times = [[once(step.run) for step in steps] for _ in range(repeats)]
    peak = max(peak, convolution_peak(device, dtype))
    print("| network | parameters | GFLOP/image | images/s | GFLOP/s | of conv peak | ours is so many times as fast |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for number, step in enumerate(steps):
        rate = step.gflop * batch / statistics.median(row[number] for row in times)
        ratios = [ours * row[number] / (step.gflop * row[0]) for row in times]  # of FLOPs per second, pair by pair
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if number else ""
        print(
            f"| {step.name} | {step.parameters / 1e6:.0f} M | {step.gflop:.1f} | {rate / step.gflop:.1f} | {rate:.0f}"
            f" | {rate / peak:.0%} of {peak:.0f} | {ratio} |"
        )


def machine_peak(config: TrainConfig) -> float:
    """Of convolutions in the run's number format, in GFLOP/s."""
    return convolution_peak(choose_device(None), DTYPES[settled(config).training.precision])


@click.command()
@click.argument("configs", nargs=-1)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting of every run.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Measured; as many warm up.")
@click.option("--optimizers", default="adamw", show_default=True, help="Separated by commas.")
@click.option("--datasheet", type=float, metavar="GFLOPS", help="The device's stated peak, for MFU.")
@click.option("--peers", is_flag=True, help="Compare networks of a base stage in place of running the trainer.")
@click.option(
    "--imagen", type=click.Path(exists=True, file_okay=False, path_type=Path), help="imagen-pytorch's folder."
)
def main(
    configs: tuple[str, ...],
    changes: tuple[str, ...],
    steps: int,
    optimizers: str,
    datasheet: float | None,
    peers: bool,
    imagen: Path | None,
) -> None:
    """Print the table."""
    keep_freed_memory()  # for the peers, too
    configs = configs or ("preset:bundled/base",)
    threads = torch.get_num_threads()
    print(f"{choose_device(None)}, {threads} threads, torch {torch.__version__}, load {load_average():.1f}\n")
    if peers:
        run = settings(configs[0], changes, steps, "unused")
        if run.stage.low_resolution is not None:
            raise click.UsageError(f"--peers compares base stages; {configs[0]} is a super-resolution stage")
        peer_table(run, imagen, steps)
    else:
        trainer_table(configs, changes, steps, optimizers.split(","), datasheet)


if __name__ == "__main__":
    main()
