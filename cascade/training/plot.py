"""Curves of runs in one figure: a panel for each logged quantity, a line for each run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.errors import CascadeError
from cascade.training.log import band_names, read_entries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
MOST_POINTS = 2000
"""Points per curve, which is about 300 pixels wide; matplotlib takes a minute for a million points."""
_PANEL_INCHES = (3.6, 2.4)

Curve = list[tuple[int, float]]
"""(step, value) in the order of the steps."""


def read_curves(run: Path) -> dict[str, Curve]:
    """The logged quantities of a run by name. run: its folder, or the log.jsonl in it.

    A truncated line of a killed run is skipped. Raises CascadeError when the log is missing or empty.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.exists():
        raise CascadeError(f"{path}: no such file; name the folder of a training run")
    curves: dict[str, Curve] = {}
    for entry in read_entries(path):
        step = entry.pop("step")
        for name, value in entry.items():
            if value is not None:
                curves.setdefault(name, []).append((step, float(value)))
    if not curves:
        raise CascadeError(f"{path}: holds no entries; is it the log.jsonl of a training run?")
    return curves


def panels(runs: Sequence[Mapping[str, Curve]]) -> list[str]:
    """The names to draw: losses first, from noisy to clean, then all others in the order of the log."""
    names = dict.fromkeys(name for curves in runs for name in curves)
    first = [name for name in ("loss", "validation_loss", *band_names()) if name in names]
    return first + [name for name in names if name not in first]


def draw_curves(runs: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """The figure for runs by their names. Raises CascadeError when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CascadeError("drawing curves needs matplotlib: pip install 'cascade-diffusion[plot]'") from None
    names = panels(list(runs.values()))
    rows, columns = -(-len(names) // COLUMNS), min(COLUMNS, len(names))
    figure = Figure(figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        _draw_panel(axis, name, runs)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return figure


def thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points of a curve with the same appearance: the extremes of each interval."""
    if len(curve) <= MOST_POINTS:
        return curve
    length = -(-len(curve) * 2 // MOST_POINTS)
    stretches = (curve[start : start + length] for start in range(0, len(curve), length))
    return [
        point
        for stretch in stretches
        for point in sorted({min(stretch, key=itemgetter(1)), max(stretch, key=itemgetter(1))})
    ]


def _draw_panel(axis: Axes, name: str, runs: Mapping[str, Mapping[str, Curve]]) -> None:
    for number, (run, curves) in enumerate(runs.items()):
        # A run without this quantity gets an empty line, so that its colour is the same in every panel.
        points: Sequence[tuple[float, float]] = thinned(curves.get(name, [])) or [(math.nan, math.nan)]
        steps, values = zip(*points, strict=True)
        single = "." if len(steps) == 1 else ""
        axis.plot(steps, values, label=run, linewidth=1, color=f"C{number % 10}", marker=single)
    logged = [value for curves in runs.values() for _, value in curves.get(name, [])]
    if ("loss" in name or "norm" in name) and min(logged) > 0:
        axis.set_yscale("log")  # losses fall by factors
    axis.set_title(name, fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3, which="both")
