"""Batch generation: overhead over the network's own time, start-up, memory by number of prompts, several processes.

    python scripts/bench_batch.py [--only overhead|start-up|memory|processes] [--model MODEL]
    python scripts/bench_batch.py --only memory --prompts 1000,100000 --drawn 1000,20000    # about half an hour

overhead: the same pictures drawn and discarded, which gives the time inside the network, and drawn by a whole run,
alternating; wall time of the latter over network time of the former. Reading, encoding of prompts, PNG, writing and
the writer's competition with the network are the overhead.
start-up: a run of one picture from the start of the interpreter, and the same run again, which draws nothing.
memory: the largest resident size by number of prompts: once with all but one refused, to show growth in reading,
planning and recording failures; once with all drawn, by a tiny network with the bundled text encoder.
processes: pictures per second of one process and of two through accelerate, each with one thread, alternating.

Figures are medians over `--repeats`. The load is printed: a second busy process costs several times, so measure on a
quiet machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from measure import load_average

from cascade import CascadePipeline, StageConfig, TextEncoder
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Planner
from cascade.batch.run import run_batch
from cascade.config.sampling import SamplingConfig
from cascade.models.unet import UNetConfig
from cascade.prompts.reading import read_prompts
from cascade.prompts.records import PromptRecord
from cascade.stage import build_stage
from cascade.storage.index import BUNDLED

PARTS = ("overhead", "start-up", "memory", "processes")
MEMORY = """
import resource, sys
from cascade.cli.program import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def write_prompts(path: Path, count: int, good: int | None = None) -> Path:
    """`count` lines with an id each; beyond the first `good` ones they name a stage that does not exist."""
    with path.open("w") as file:
        for number in range(count):
            line = {"prompt": f"a fox in picture {number}", "id": str(number)}
            bad = {} if good is None or number < good else {"steps": {"none": 1}}
            file.write(json.dumps(line | bad) + "\n")
    return path


def call(model: str | Path | None, prompts: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `cascade`."""
    source = ["--model", str(model)] if model else []
    return ["generate", *source, "--prompts", str(prompts), "--out", str(out), "--seed", "0", "--quiet", *more]


# --- overhead ----------------------------------------------------------------------------------------------


def overhead(model: str | None, folder: Path, repeats: int, pictures: int, options: DrawOptions) -> None:
    """Wall time of warm runs, over the time inside the network when nothing else is done."""
    pipeline = CascadePipeline.from_pretrained(model)
    path = write_prompts(folder / "overhead.jsonl", pictures)
    network_alone(pipeline, write_prompts(folder / "warm.jsonl", 2), options)
    alone, walls = [], []
    for repeat in range(repeats):
        alone.append(network_alone(pipeline, path, options))
        walls.append(whole_run(pipeline, path, folder / f"overhead{repeat}", options))
        click.echo(f"  network alone {alone[-1]:.2f} s, whole run {walls[-1]:.2f} s")
    network, wall = statistics.median(alone), statistics.median(walls)
    click.echo(f"{pictures} pictures: {pictures / wall:.2f} a second, {100 * (wall / network - 1):.1f} % overhead")


def network_alone(pipeline: CascadePipeline, path: Path, options: DrawOptions) -> float:
    """Seconds inside the network; the pictures are discarded."""
    engine, planner = pipeline.engine(options.conduct()), Planner(pipeline, options)
    for record in read_prompts(str(path), 0):
        assert isinstance(record, PromptRecord)
        engine.draw_all([target.task() for target in planner.job(record).targets()])
    return engine.network_seconds


def whole_run(pipeline: CascadePipeline, path: Path, out: Path, options: DrawOptions) -> float:
    """Seconds of a run, until the last picture is written."""
    with Output(out) as output:
        output.begin({"seed": 0})
        start = time.perf_counter()
        run_batch(pipeline, read_prompts(str(path), 0), options, output)
        return time.perf_counter() - start


# --- start-up ----------------------------------------------------------------------------------------------


def start_up(model: str | None, folder: Path, repeats: int, more: list[str]) -> None:
    """Seconds of a run of one picture, and of the same run again, which draws nothing."""
    path = write_prompts(folder / "one.jsonl", 1)
    names = ("one picture", "the same again")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            command = [sys.executable, "-m", "cascade", *call(model, path, folder / f"one{repeat}", *more)]
            start = time.perf_counter()
            subprocess.run(command, check=True)
            seconds[name].append(time.perf_counter() - start)
    for name in names:
        click.echo(f"start-up, {name}: {statistics.median(seconds[name]):.2f} s")


# --- memory ------------------------------------------------------------------------------------------------


def memory(folder: Path, refused: list[int], drawn: list[int], more: list[str]) -> None:
    """Largest resident size by number of prompts."""
    model = tiny_model(folder / "tiny")
    for name, counts, good in (("refused", refused, 1), ("drawn", drawn, None)):
        for count in counts:
            path = write_prompts(folder / f"{name}{count}.jsonl", count, good)
            start = time.perf_counter()
            largest = megabytes(call(model, path, folder / f"{name}{count}", *more))
            click.echo(f"{count} prompts {name}: {largest:.0f} MB at most, {time.perf_counter() - start:.0f} s")


def tiny_model(folder: Path) -> Path:
    """A cascade that draws in milliseconds: stages of 8 and 16 px, random weights, the bundled text encoder."""
    encoder = TextEncoder.from_pretrained(BUNDLED / "text_encoder")
    network = UNetConfig(
        channels=(8,),
        blocks=(1,),
        strides=(1,),
        attention=(True,),
        groups=4,
        head_dim=8,
        embedding_dim=16,
        text_dim=encoder.dim,
    )
    configs = [
        StageConfig(name="base", resolution=8, model=network, sampling=SamplingConfig(steps=1)),
        StageConfig(name="sr16", resolution=16, low_resolution=8, model=network, sampling=SamplingConfig(steps=1)),
    ]
    CascadePipeline(encoder, [build_stage(config, seed=0) for config in configs], name="tiny").save_pretrained(folder)
    return folder


def megabytes(arguments: list[str]) -> float:
    """Largest resident size of `cascade` with these arguments; it may fail."""
    command = [sys.executable, "-c", MEMORY, *arguments]
    with tempfile.TemporaryFile("w+") as told:  # a line for each prompt that is refused
        subprocess.run(command, stderr=told, check=False)
        told.seek(max(0, told.tell() - 100))
        kilobytes = int(told.read().splitlines()[-1])
    return kilobytes / (1024 if sys.platform == "linux" else 1024**2)


# --- processes ---------------------------------------------------------------------------------------------


def processes(model: str | None, folder: Path, repeats: int, pictures: int, more: list[str]) -> None:
    """Pictures per second of drawing, without start-up."""
    path = write_prompts(folder / "split.jsonl", pictures)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for count in rates:
            out = folder / f"split{repeat}-{count}"
            launch(count, call(model, path, out, *more))
            rates[count].append(rate(out))
            click.echo(f"  {count} process(es): {rates[count][-1]:.2f} pictures a second")
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    click.echo(
        f"processes: {one:.2f} pictures a second by one, {two:.2f} by two, {100 * two / (2 * one):.0f} % efficient"
    )


def launch(count: int, arguments: list[str]) -> None:
    """Run `cascade` in `count` processes of one thread."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", "-m"]
    start = launcher if count > 1 else [sys.executable, "-m"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, "cascade", *arguments], env=environment, check=True)


def rate(out: Path) -> float:
    """Pictures per second, from the file times: from when all processes are drawing to the last picture."""
    stamps = sorted(path.stat().st_mtime for path in out.glob("*.png"))
    warm = len(stamps) // 4
    return (len(stamps) - warm - 1) / (stamps[-1] - stamps[warm])


def numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


@click.command()
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Parts to measure; default: all.")
@click.option("--model", help="A folder or hub id, but for memory; default: the bundled cascade.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--pictures", default=12, show_default=True, help="For overhead.")
@click.option("--until", type=int, help="For overhead and start-up: stop after the stage of this size.")
@click.option("--batch-size", type=int, help="Pictures per network call.")
@click.option("--prompts", default="1000,100000", show_default=True, callback=numbers, help="For memory: refused.")
@click.option("--drawn", default="1000,4000", show_default=True, callback=numbers, help="For memory: drawn.")
@click.option("--low-memory", is_flag=True, help="For memory: smaller pictures wait on the disk.")
@click.option("--split", default=40, show_default=True, help="Pictures for processes.")
@click.option("--split-until", default=256, show_default=True, help="Their size.")
def main(
    only: tuple[str, ...],
    model: str | None,
    repeats: int,
    pictures: int,
    until: int | None,
    batch_size: int | None,
    prompts: list[int],
    drawn: list[int],
    low_memory: bool,
    split: int,
    split_until: int,
) -> None:
    """Measure; prints figures and the load of the machine."""
    click.echo(f"load {load_average():.1f} on {os.cpu_count()} cores")
    size = ["--until", str(until)] if until else []
    batch = ["--batch-size", str(batch_size)] if batch_size else []
    options = DrawOptions(run_seed=0, until=until, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts: dict[str, Callable[[], None]] = {
            "overhead": partial(overhead, model, folder, repeats, pictures, options),
            "start-up": partial(start_up, model, folder, repeats, size),
            "memory": partial(memory, folder, prompts, drawn, ["--low-memory"] * low_memory),
            "processes": partial(processes, model, folder, repeats, split, ["--until", str(split_until), *batch]),
        }
        for name, part in parts.items():
            if name in (only or PARTS):
                part()
    click.echo(f"load {load_average():.1f} at the end")


if __name__ == "__main__":
    main()
