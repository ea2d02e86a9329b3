"""`cascade plot`: the curves of training runs as a picture."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="curves.png", show_default=True)
def plot(runs: tuple[Path, ...], out: Path) -> int:
    """Draw what runs logged: loss, loss by noise level, learning rate, gradient norm, pictures per second.

    RUNS are folders of training runs; each is a line in every panel. Needs no server and no display.

    \b
    cascade plot runs/base
    cascade plot runs/wide runs/deep --out both.png
    """
    from cascade.checkpoint import atomic_file
    from cascade.training.plot import draw_curves, read_curves

    figure = draw_curves({str(run): read_curves(run) for run in runs})
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    click.echo(f"{len(runs)} runs: {out}" if len(runs) > 1 else str(out))
    return 0
