"""Quality against network calls: the base stage drawn with each sampler, number of calls and guidance, one table.

    python scripts/sweep_sampling.py [MODEL] --data prepared [--samplers dpm++,heun,ddim,ddpm] [--calls 4,8,16,32,64]

First each sampler at each number of calls with the model's own guidance, then its own sampler and steps at each
guidance and within each interval of log SNR (Kynkaanniemi et al. 2024). The figures are those of
`cascade evaluate --suite art` and `--suite scenes` over the first --limit prompts of each. A guided step evaluates the
network for the prompt and the negative prompt in one batch, which counts as one call; Heun's method makes two calls
per step, but one in the last. A row's score is the mean of every figure's share of the best in its column; "of best"
is the row's score as a share of the best row's: the default should reach 95 % with the fewest calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from cascade import CascadePipeline, Stage
from cascade.diffusion.samplers import SAMPLERS, evaluations
from cascade.drawing.slots import StageSlot
from cascade.evaluation import art, scenes
from cascade.evaluation.report import Report, Request

HIGHER = {
    "art": ("retrieval at 10 of 100, training subjects", "style obeyed"),
    "scenes": ("attribute: shape", "attribute: colour", "all correct"),
}
DISTANCE = "sliced Wasserstein distance"


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    sampler: str
    calls: int
    guidance: float
    interval: tuple[float, float] | None

    @property
    def steps(self) -> int:
        """The largest number of steps within the number of calls."""
        return next(steps for steps in range(self.calls, 0, -1) if calls_of(self.sampler, steps) <= self.calls)

    @property
    def calls_made(self) -> int:
        """The number of calls of these steps; Heun's method, for example, always makes an odd number."""
        return calls_of(self.sampler, self.steps)

    def sampling(self) -> Mapping[str, Any]:
        """The setting as arguments of the pipeline."""
        return {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance}


def calls_of(sampler: str, steps: int) -> int:
    """Number of denoiser evaluations in `steps` steps."""
    return len(evaluations(SAMPLERS[sampler], torch.linspace(-8, 8, steps + 1)))


def settings(
    own: Setting, samplers: list[str], calls: list[int], guidances: list[float], intervals: list[tuple[float, float]]
) -> Iterator[Setting]:
    """All distinct lines, including the model's own."""
    lines = [replace(own, sampler=sampler, calls=count) for sampler in samplers for count in calls]
    lines += [replace(own, guidance=guidance) for guidance in guidances]
    lines += [replace(own, interval=interval) for interval in intervals]
    yield from dict.fromkeys([*lines, own])


def with_interval(stage: Stage, interval: tuple[float, float] | None) -> StageSlot:
    """The stage with guidance only in this interval; None: at all noise levels. The network is shared."""
    sampling = stage.config.sampling.model_copy(update={"guidance_interval": interval})
    return StageSlot.holding(replace(stage, config=stage.config.model_copy(update={"sampling": sampling})))


def figures(reports: Mapping[str, Report]) -> dict[str, float]:
    """The columns by name."""
    measured = {name: {figure.name: figure.value for figure in report.figures} for name, report in reports.items()}
    columns = {name: measured[suite][name] for suite, names in HIGHER.items() if suite in measured for name in names}
    if "art" in measured and DISTANCE in measured["art"]:
        columns[DISTANCE] = measured["art"][DISTANCE]
    return columns


def of_best(rows: list[dict[str, float]]) -> list[float]:
    """Each row's score as a share of the best row's; a column without scores is ignored.

    The score is the mean share of the best of every column.
    """
    shares: list[list[float]] = [[] for _ in rows]
    for name in rows[0]:
        column = [row[name] for row in rows]
        best = min(column) if name == DISTANCE else max(column)
        if best > 0:
            for own, value in zip(shares, column, strict=True):
                own.append(best / value if name == DISTANCE else value / best)
    scores = [statistics.mean(own) for own in shares]
    return [score / max(scores) for score in scores]


def split(text: str, kind: type) -> list[Any]:
    """The values of a list with commas."""
    return [kind(value) for value in text.split(",") if value]


@click.command(context_settings={"show_default": True})
@click.argument("model", required=False)
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Without it: scenes alone.")
@click.option("--samplers", default="dpm++,heun,ddim,ddpm")
@click.option("--calls", default="4,8,16,32,64")
@click.option("--guidances", default="1,2,3,4,6")
@click.option("--interval", "intervals", type=(float, float), multiple=True, default=[(-4.0, 4.0), (-12.0, 2.0)])
@click.option("--limit", default=60, help="Prompts of each suite.")
@click.option("--seed", default=0)
def main(
    model: str | None,
    data: Path | None,
    samplers: str,
    calls: str,
    guidances: str,
    intervals: tuple[tuple[float, float], ...],
    limit: int,
    seed: int,
) -> None:
    """Print the table."""
    pipeline = CascadePipeline.from_pretrained(model)
    stage = pipeline.slots[0].load()
    default = stage.config.sampling
    kind = default.sampler.kind
    own = Setting(kind, calls_of(kind, default.steps), default.guidance, default.guidance_interval)
    lines = list(settings(own, split(samplers, str), split(calls, int), split(guidances, float), list(intervals)))
    rows = []
    for line in lines:
        pipeline.slots[0] = with_interval(stage, line.interval)
        request = Request(seed=seed, limit=limit, data=data, sampling=line.sampling(), until=stage.config.resolution)
        reports = {"scenes": scenes.run(pipeline, request)}
        if data:
            reports["art"] = art.run(pipeline, request)
        rows.append(figures(reports))
        click.echo(f"{line}: {rows[-1]}", err=True)
    click.echo(f"{pipeline.name}, seed {seed}, {limit} prompts a suite; * marks the default\n")
    click.echo(f"| sampler | calls | guidance | within log SNR | {' | '.join(rows[0])} | of best |")
    click.echo("|" + " --- |" * (len(rows[0]) + 5))
    for line, row, score in zip(lines, rows, of_best(rows), strict=True):
        mark = " *" if line == own else ""
        within = f"{line.interval[0]:g} to {line.interval[1]:g}" if line.interval else "all"
        cells = " | ".join(f"{value:.3f}" for value in row.values())
        click.echo(
            f"| {line.sampler}{mark} | {line.calls_made} | {line.guidance:g} | {within} | {cells} | {score:.0%} |"
        )


if __name__ == "__main__":
    main()
