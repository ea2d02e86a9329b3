"""Finished entries of a run's log: early warnings, and curves in one figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cascade.errors import CascadeError
from cascade.training.log import band_names, read_entries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# --- watch -----------------------------------------------------------------------------------------------------------
# Early warnings: functions from the entries of a run's log to one line, or None. They never stop a run.

Entries = Sequence[Mapping[str, Any]]
Warn = Callable[[Entries], str | None]

HISTORY = 20
"""Entries with which the last one is compared."""
ENOUGH = 8
"""Entries before which no warning is given: the start of every run looks alarming."""
SPIKE_DEVIATIONS = 8.0
"""A spike is this many median deviations above the median; normal noise reaches 5 once in a thousand entries."""
SPIKE_FACTOR = 1.5
"""A spike is also above the median by this factor, so that small changes of a nearly constant loss do not count."""
DEAD_SHARE = 1e-3
"""A gradient smaller than its usual norm by this factor is dead."""
STALE_DISTANCE = 0.5
"""An average further than this from the weights, as a share of their norm, is stale."""
IN_A_ROW = 3
"""Consecutive entries needed before a gradient is called dead or an average stale."""


def loss_spike(entries: Entries) -> str | None:
    """A warning if the last loss is far above those before it."""
    losses = _series(entries, "loss")
    if len(losses) <= ENOUGH:
        return None
    *before, last = losses[-HISTORY - 1 :]
    middle = median(before)
    deviation = median(abs(loss - middle) for loss in before)
    if last <= max(middle + SPIKE_DEVIATIONS * deviation, SPIKE_FACTOR * middle):
        return None
    sound = _having(entries, "loss")[-2]["step"]
    return (
        f"the loss is {last:.4g}, after {middle:.4g} in the middle of the last {len(before)} entries; if it stays"
        f" there, stop the run, delete its checkpoints of steps after {sound} (checkpoints/step-...), and --resume with"
        " a lower training.optimizer.learning_rate"
    )


def dead_gradients(entries: Entries) -> str | None:
    """A warning if the gradient is zero, or a thousandth of its usual norm, for several entries."""
    norms = _series(entries, "gradient_norm")
    recent, before = norms[-IN_A_ROW:], norms[-HISTORY - IN_A_ROW : -IN_A_ROW]
    if len(recent) < IN_A_ROW:
        return None
    usual = median(before) if len(before) >= ENOUGH else 0.0
    if max(recent) > DEAD_SHARE * usual:
        return None
    return (
        f"the gradient's norm is {recent[-1]:.3g}, after {usual:.3g}: training has stalled; check the sample pictures"
        " (are they all the same?), training.precision and training.frozen"
    )


def stale_average(entries: Entries) -> str | None:
    """A warning if the average of the weights is far from them for several entries, and not approaching them."""
    distances = _series(entries, "ema_distance")
    recent = distances[-IN_A_ROW:]
    if len(distances) <= ENOUGH or min(recent) < STALE_DISTANCE or recent[-1] < recent[0]:
        return None
    return (
        f"the averaged weights, which are saved for drawing, are {recent[-1]:.0%} of their norm away from the"
        " weights; lower training.ema.half_life_images or training.optimizer.learning_rate"
    )


WARNINGS: tuple[Warn, ...] = (loss_spike, dead_gradients, stale_average)


class Watch:
    """Gives each warning when its condition begins to hold, and again only after the condition has ended."""

    def __init__(self) -> None:
        self._holding: set[Warn] = set()

    def new_warnings(self, entries: Entries) -> list[str]:
        """The warnings that begin with the last entry. entries: all entries of the run so far, oldest first."""
        recent = entries[-HISTORY - IN_A_ROW - 1 :]
        lines = {warn: warn(recent) for warn in WARNINGS}
        fresh = [line for warn, line in lines.items() if line is not None and warn not in self._holding]
        self._holding = {warn for warn, line in lines.items() if line is not None}
        return fresh


def _series(entries: Entries, name: str) -> list[float]:
    """The finite values of a quantity, in order."""
    return [float(entry[name]) for entry in _having(entries, name)]


def _having(entries: Entries, name: str) -> list[Mapping[str, Any]]:
    """The entries with a finite value of a quantity; others, such as those of a validation, are skipped."""
    return [entry for entry in entries if entry.get(name) is not None and math.isfinite(entry[name])]


# --- plot ------------------------------------------------------------------------------------------------------------
# Curves of runs in one figure: a panel for each logged quantity, a line for each run.

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
