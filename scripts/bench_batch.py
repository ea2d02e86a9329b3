"""Batch generation: overhead over the network's own time, start-up, and memory by number of prompts.

    python scripts/bench_batch.py [--model MODEL] [--pictures 200] [--prompts 1000,100000] [--processes 1,2]

Overhead: one run in this process, its wall time against the sum of the time inside the network. Start-up: a run of
one picture, from the start of the interpreter. Memory: the largest resident size of a run over so many prompts of
which all are refused but one, so that reading, planning and writing failures is what grows, if anything does.
Processes: wall time of one against several through accelerate, each with one thread. The load is printed: a second
busy process costs several times, so measure on a quiet machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from cascade import CascadePipeline
from cascade.batch import DrawOptions, Output
from cascade.batch.engine import Engine
from cascade.batch.run import run_batch
from cascade.prompts import read_prompts

MEMORY = """
import resource, sys
from cascade.cli import main
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


def overhead(model: str | None, folder: Path, pictures: int, until: int | None, batch_size: int) -> None:
    """Wall time of a run, once warmed up, against the time inside the network."""
    pipeline = CascadePipeline.from_pretrained(model)
    options = DrawOptions(run_seed=0, until=until, batch_size=batch_size)
    engines: list[Engine] = []
    draw = Engine.draw

    def watched(self: Engine, tasks):  # type: ignore[no-untyped-def]
        if self not in engines:
            engines.append(self)
        return draw(self, tasks)

    Engine.draw = watched  # type: ignore[method-assign]
    for count in (2 * batch_size, pictures):
        path = write_prompts(folder / f"{count}.jsonl", count)
        with Output(folder / f"out{count}") as output:
            output.begin({"seed": 0})
            start = time.perf_counter()
            run_batch(pipeline, read_prompts(str(path), 0), options, output)
            wall = time.perf_counter() - start
    Engine.draw = draw  # type: ignore[method-assign]
    network = engines[-1].network_seconds
    click.echo(f"{pictures} pictures in {wall:.2f} s, {pictures / wall:.2f} a second; network {network:.2f} s")
    click.echo(f"overhead {100 * (wall - network) / network:.1f} % of the network's time; texts are in it")


def command(model: str | None, prompts: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `cascade`."""
    source = ["--model", model] if model else []
    return ["generate", *source, "--prompts", str(prompts), "--out", str(out), "--seed", "0", "--quiet", *more]


def start_up(model: str | None, folder: Path, until: list[str]) -> None:
    """Seconds of a run of one picture, and of the same run again, which draws nothing."""
    path = write_prompts(folder / "one.jsonl", 1)
    for name in ("one picture", "the same again"):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cascade", *command(model, path, folder / "one", *until)], check=True)
        click.echo(f"start-up, {name}: {time.perf_counter() - start:.2f} s")


def memory(model: str | None, folder: Path, counts: list[int], until: list[str]) -> None:
    """Largest resident size by number of prompts."""
    for count in counts:
        path = write_prompts(folder / f"memory{count}.jsonl", count, good=1)
        arguments = command(model, path, folder / f"memory{count}", *until)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *arguments], stderr=subprocess.PIPE, text=True, check=False
        )
        megabytes = int(done.stderr.splitlines()[-1]) * (1 if sys.platform == "linux" else 1 / 1024) / 1024
        click.echo(f"{count} prompts: {megabytes:.0f} MB at most, {time.perf_counter() - start:.1f} s")


def processes(model: str | None, folder: Path, counts: list[int], pictures: int, until: list[str]) -> None:
    """Pictures a second of the drawing itself, start-up left out: by the times in the log of the first process."""
    path = write_prompts(folder / "split.jsonl", pictures)
    base = 0.0
    for count in counts:
        out = folder / f"split{count}"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0", "-m"]
        start = launcher if count > 1 else [sys.executable, "-m"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, "cascade", *command(model, path, out, *until)], env=environment, check=True)
        stamps = sorted(entry.stat().st_mtime for entry in out.glob("*.png"))
        # From the picture at which all processes are at work to the last one.
        warm = len(stamps) // 4
        rate = (len(stamps) - warm - 1) / (stamps[-1] - stamps[warm])
        base = base or rate
        click.echo(f"{count} process(es): {rate:.2f} pictures a second, {100 * rate / (count * base):.0f} % efficient")


@click.command()
@click.option("--model")
@click.option("--pictures", default=200, show_default=True)
@click.option("--prompts", default="1000,100000", show_default=True, help="Numbers of prompts for memory.")
@click.option("--processes", "split", default="", help="Numbers of processes, such as 1,2.")
@click.option("--until", type=int, help="Stop after the stage of this size.")
@click.option("--batch-size", default=1, show_default=True)
def main(model: str | None, pictures: int, prompts: str, split: str, until: int | None, batch_size: int) -> None:
    """Measure; prints figures and the load of the machine."""
    click.echo(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    stage = ["--until", str(until)] if until else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overhead(model, folder, pictures, until, batch_size)
        start_up(model, folder, stage)
        memory(model, folder, [int(count) for count in prompts.split(",") if count], stage)
        processes(model, folder, [int(count) for count in split.split(",") if count], pictures, stage)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    click.echo(f"load {os.getloadavg()[0]:.1f} at the end, this process {peak} MB at most")


if __name__ == "__main__":
    main()
