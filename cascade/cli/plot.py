"""`cascade plot`: draws the curves of training runs."""

from __future__ import annotations

from pathlib import Path

import click

from cascade.cli.paths import path_argument, path_option
from cascade.cli.say import say

_PROGRAM = "cascade plot"


@click.command()
@path_argument("runs", nargs=-1, required=True)
@path_option("--out", default="curves.png", show_default=True)
def plot(runs: tuple[str, ...], out: str) -> int:
    """Draw the logs of runs: loss, loss by noise level, learning rate, gradient norm, pictures per second.

    RUNS are folders of training runs; each is a line in every panel. Needs no server and no display.

    \b
    cascade plot runs/base
    cascade plot runs/wide runs/deep --out both.png
    """
    from cascade.checkpoint import atomic_file
    from cascade.files.replaceable import SOFTWARE, check_png
    from cascade.training.plot import draw_curves, read_curves

    check_png(Path(out), _PROGRAM)
    figure = draw_curves({run: read_curves(Path(run)) for run in runs})
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={SOFTWARE: _PROGRAM})
    say(f"{len(runs)} runs: {out}" if len(runs) > 1 else out)
    return 0
