"""Early warnings: functions from the entries of a run's log to one line, or None. They never stop a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

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
