"""Seconds, FLOPs, achieved GFLOP/s against this machine's convolution peak, and memory: per stage and whole.

    python scripts/bench_generate.py [--model MODEL] [--dtype float32] [--repeats 5]
    python scripts/bench_generate.py --enlarge 256 --enlarge 1024 --enlarge 1024/512
    python scripts/bench_generate.py --operations

The peak is measured in the same run, with 3x3 convolutions at the widths that U-Nets use, before and after. The load is
printed: a second busy process costs several times, so measure on a quiet machine.

`--operations` instead prints the share of each stage's time by kind of operation, from torch's profiler, which slows
small operations down by some microseconds each.

A second table measures `pipeline.upscale` of pictures of --enlarge px to four times that, in tiles of the number after
the slash; each in a separate process, because memory is the peak of a process.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import click
import psutil
import torch
from measure import convolution_peak, load_average, once, peak_memory
from PIL import Image
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from cascade import CascadePipeline
from cascade.system.device import choose_device, choose_dtype


def stage_seconds(pipeline: CascadePipeline, prompt: str, preset: str | None) -> dict[str, float]:
    """Seconds of each stage in one run, from the last step of the previous stage to its own; then the rest."""
    marks = {"start": time.perf_counter()}

    def mark(stage: str, _step: int, _steps: int, _x_hat: torch.Tensor) -> None:
        marks[stage] = time.perf_counter()

    pipeline(prompt, seed=0, preset=preset, callback=mark)
    marks["picture"] = time.perf_counter()
    return {name: marks[name] - before for before, name in zip(marks.values(), list(marks)[1:], strict=False)}


def stage_gflop(pipeline: CascadePipeline, prompt: str, preset: str | None) -> tuple[dict[str, float], dict[str, int]]:
    """GFLOP and steps of each stage, counted by torch while a picture is drawn."""
    totals: dict[str, float] = {}
    steps: dict[str, int] = {}
    # On a CPU torch counts only the plain attention kernel; the products are the same.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:

        def mark(stage: str, _step: int, count: int, _x_hat: torch.Tensor) -> None:
            totals[stage], steps[stage] = counter.get_total_flops() / 1e9, count

        pipeline(prompt, seed=0, preset=preset, callback=mark)
    return {
        name: total - before for (name, total), before in zip(totals.items(), [0.0, *totals.values()], strict=False)
    }, steps


KINDS = {
    "convolutions": ("mkldnn_convolution", "_slow_conv2d_forward", "thnn_conv2d"),
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_softmax", "masked_fill_"),
    "norms": ("native_layer_norm", "native_group_norm"),
    "SiLU": ("silu", "silu_"),
    "copies": ("copy_", "cat", "fill_", "zero_", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle"),
}
"""Operations of torch, without `aten::`, by kind; the rest of them is elementwise or a view."""
REST, OUTSIDE = "other operations", "outside operations"


def operation_seconds(pipeline: CascadePipeline, prompt: str, preset: str | None) -> dict[str, Counter[str]]:
    """Seconds of each stage by kind of operation, in one run; outside of torch's operations it is Python's."""
    kinds = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}

    def mark(stage: str, _step: int, _steps: int, _x_hat: torch.Tensor) -> None:
        with record_function(f"step of {stage}"):
            pass

    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("picture"):
        pipeline(prompt, seed=0, preset=preset, callback=mark)
    events: list[FunctionEvent] = list(profiler.events())
    ordered = sorted(events, key=lambda event: event.time_range.start)
    (start,) = (event.time_range.start for event in ordered if event.name == "picture")
    steps = {event.name: event.time_range.start for event in ordered if event.name.startswith("step of ")}
    found: dict[str, Counter[str]] = {}
    for name, end in steps.items():  # the last step of each stage
        inside = [event for event in events if start <= event.time_range.start < end]
        seconds: Counter[str] = Counter()
        for event in inside:
            if event.name.startswith("aten::"):
                seconds[kinds.get(event.name, REST)] += event.self_cpu_time_total / 1e6
        seconds[OUTSIDE] = (end - start) / 1e6 - seconds.total()
        found[name.removeprefix("step of ")], start = seconds, end
    return found


def operations_table(pipeline: CascadePipeline, prompt: str, preset: str | None, repeats: int) -> None:
    """Print the share of each stage's time by kind of operation."""
    operation_seconds(pipeline, prompt, preset)
    total: dict[str, Counter[str]] = {}
    for _ in range(repeats):
        for stage, seconds in operation_seconds(pipeline, prompt, preset).items():
            total.setdefault(stage, Counter()).update(seconds)
    columns = [*KINDS, REST, OUTSIDE]
    print(f"| part | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for stage, seconds in total.items():
        shares = (f"{seconds[kind] / seconds.total():.0%}" for kind in columns)
        print(f"| {stage} | {' | '.join(shares)} |", flush=True)


class Enlarging(NamedTuple):
    """Cost of `pipeline.upscale`: median seconds, and peak memory above the loaded model in GB."""

    seconds: float
    memory: float


def enlarge(model: str | None, dtype: str | None, device: str | None, size: int, tile: int | None) -> Enlarging:
    """Enlarge a picture of size x size by a factor of four; once to warm up, three times for the time."""
    target = choose_device(device)
    pipeline = CascadePipeline.from_pretrained(model, device=target, dtype=choose_dtype(dtype, target))
    pipeline.upscale(Image.new("RGB", (8, 8)), to=16, seed=0)  # objects loaded on first use count as the model
    loaded = psutil.Process().memory_info().rss / 1e9
    picture = Image.effect_noise((size, size), 50).convert("RGB")

    def act() -> None:
        pipeline.upscale(picture, prompt="a red apple, noto style", to=4 * size, tile=tile, seed=0)

    act()
    return Enlarging(statistics.median(once(act) for _ in range(3)), peak_memory() - loaded)


def enlarging_table(
    model: str | None, dtype: str | None, device: str | None, sizes: tuple[tuple[int, int | None], ...]
) -> None:
    """Print a line for each size and tile."""
    print("\n| picture | becomes | tile | seconds | GB above the loaded model |\n| --- | --- | --- | --- | --- |")
    for size, tile in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            cost = pool.submit(enlarge, model, dtype, device, size, tile).result()
        line = f"| {size} px | {4 * size} px | {tile or ''} | {cost.seconds:.2f} | {cost.memory:.2f} |"
        print(line, flush=True)


def sizes_of(texts: tuple[str, ...]) -> tuple[tuple[int, int | None], ...]:
    """`1024/512` as (1024, 512), `256` as (256, None)."""
    parts = [text.partition("/") for text in texts]
    return tuple((int(size), int(tile) if tile else None) for size, _, tile in parts)


@click.command()
@click.option("--model", default=None, help="Folder or hub id; default the bundled cascade.")
@click.option("--prompt", default="a red apple, noto style")
@click.option("--dtype", default=None, help="float32 or bfloat16.")
@click.option("--device", default=None)
@click.option("--preset", default=None)
@click.option("--repeats", default=7, show_default=True)
@click.option("--enlarge", "enlarged", multiple=True, default=("256", "1024"), show_default=True, metavar="PX[/TILE]")
@click.option("--operations", is_flag=True, help="Shares of time by kind of operation instead.")
def main(
    model: str | None,
    prompt: str,
    dtype: str | None,
    device: str | None,
    preset: str | None,
    repeats: int,
    enlarged: tuple[str, ...],
    operations: bool,
) -> None:
    """Print the tables."""
    if operations:
        target = choose_device(device)
        pipeline = CascadePipeline.from_pretrained(model, device=target, dtype=choose_dtype(dtype, target))
        operations_table(pipeline, prompt, preset, repeats)
        return
    sizes = sizes_of(enlarged)
    generation_table(model, prompt, dtype, device, preset, repeats)
    enlarging_table(model, dtype, device, sizes)


def generation_table(
    model: str | None, prompt: str, dtype: str | None, device: str | None, preset: str | None, repeats: int
) -> None:
    """Print the cost of a picture from a prompt, stage by stage."""
    target = choose_device(device)
    number_format = choose_dtype(dtype, target)
    start = time.perf_counter()
    pipeline = CascadePipeline.from_pretrained(model, device=target, dtype=number_format)
    loading = time.perf_counter() - start
    threads = torch.get_num_threads()
    print(f"{target}, {number_format}, {threads} threads, torch {torch.__version__}, load {load_average():.1f}")
    print(f"loading the model: {loading:.2f} s, {peak_memory():.2f} GB\n")
    before = convolution_peak(target, number_format)
    gflop, steps = stage_gflop(pipeline, prompt, preset)
    runs = [stage_seconds(pipeline, prompt, preset) for _ in range(repeats)]
    peak = max(before, convolution_peak(target, number_format))
    print("| part | steps | GFLOP | seconds | GFLOP/s | of conv peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in runs[0]:
        elapsed = statistics.median(run[name] for run in runs)
        if name in gflop:
            rate = gflop[name] / elapsed
            print(f"| {name} | {steps[name]} | {gflop[name]:.1f} | {elapsed:.3f} | {rate:.0f} | {rate / peak:.0%} |")
        else:
            print(f"| to PIL | | | {elapsed:.3f} | | |")
    total, whole = statistics.median(sum(run.values()) for run in runs), sum(gflop.values())
    print(f"| prompt to picture | | {whole:.1f} | {total:.3f} | {whole / total:.0f} | {whole / total / peak:.0%} |")
    print(f"\n3x3 convolution peak {peak:.0f} GFLOP/s; peak memory {peak_memory():.2f} GB; medians of {repeats} runs")


if __name__ == "__main__":
    main()
