"""Time of whole commands in fresh processes, alternating with `import torch` alone.

    python scripts/bench_start.py [--repeats 5] [--prompt "a red apple"]

Prints median clock and processor time, and both as multiples of `import torch`'s. The first round, which loads the
files into memory, is not counted.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import click
from measure import load_average

Seconds = tuple[float, float]


def run(arguments: list[str], folder: str, status: int) -> Seconds:
    """Clock and processor time of a process. Another exit status than `status` ends the benchmark."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise click.ClickException(f"{' '.join(arguments)}: ended with {done.returncode}: {done.stderr}")
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@click.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Rounds that are counted.")
@click.option("--prompt", default="a red apple", show_default=True, help="Prompt to draw.")
def main(repeats: int, prompt: str) -> None:
    """Print a row for each command."""
    draw = ["-m", "cascade", "generate", prompt, "--seed", "0", "--out", "pictures", "--overwrite"]
    commands = {
        "import torch": (["-c", "import torch"], 0),
        "cascade --help": (["-m", "cascade", "--help"], 0),
        "a wrong option": (["-m", "cascade", "generate", prompt, "--stepz", "3"], 2),
        "generate --until 64": ([*draw, "--until", "64"], 0),
        "generate": (draw, 0),
    }
    times: dict[str, list[Seconds]] = defaultdict(list)
    click.echo(f"{os.cpu_count()} processors, load {load_average()}")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            for name, (arguments, status) in commands.items():
                times[name].append(run(arguments, folder, status))
    clock, processor = (
        {name: statistics.median(t[way] for t in found[1:]) for name, found in times.items()} for way in (0, 1)
    )
    for name in commands:
        by_clock, by_processor = clock[name], processor[name]
        shares = f"{by_clock / clock['import torch']:.2f} {by_processor / processor['import torch']:>6.2f}"
        click.echo(f"{name:20} {by_clock:6.2f} s {by_processor:6.2f} s of processor   times import torch: {shares}")


if __name__ == "__main__":
    main()
