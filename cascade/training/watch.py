"""Early warnings: small functions from the entries of a run's log to one line, or None. They never stop a run."""

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
"""Entries before which nothing is said: the start of every run looks alarming."""
SPIKE_DEVIATIONS = 8.0
"""A spike lies this many median deviations above the median; normal noise reaches 5 once in a thousand entries."""
SPIKE_FACTOR = 1.5
"""And above the median by this factor, so that a loss that hardly moves may move a little."""
DEAD_SHARE = 1e-3
"""A gradient this much smaller than it was is dead."""
STALE_DISTANCE = 0.5
"""An average further than this from the weights, as a share of their norm, draws what the network no longer is."""
IN_A_ROW = 3
"""Entries that must agree before a gradient is called dead or an average stale."""


def loss_spike(entries: Entries) -> str | None:
    """The last loss stands far above those before it."""
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
    """The gradient has vanished: zero, or a thousandth of what it was, for several entries."""
    norms = _series(entries, "gradient_norm")
    recent, before = norms[-IN_A_ROW:], norms[-HISTORY - IN_A_ROW : -IN_A_ROW]
    if len(recent) < IN_A_ROW:
        return None
    usual = median(before) if len(before) >= ENOUGH else 0.0
    if max(recent) > DEAD_SHARE * usual:
        return None
    return (
        f"the gradient's norm is {recent[-1]:.3g}, after {usual:.3g}: the network learns no more; look at the pictures"
        " (are they all the same?), training.precision and training.frozen"
    )


def stale_average(entries: Entries) -> str | None:
    """The average of the weights does not follow them: far away for several entries, and not coming closer."""
    distances = _series(entries, "ema_distance")
    recent = distances[-IN_A_ROW:]
    if len(distances) <= ENOUGH or min(recent) < STALE_DISTANCE or recent[-1] < recent[0]:
        return None
    return (
        f"the averaged weights, which are what gets saved for drawing, lie {recent[-1]:.0%} of their norm away from the"
        " weights; lower training.ema.half_life_images or training.optimizer.learning_rate"
    )


WARNINGS: tuple[Warn, ...] = (loss_spike, dead_gradients, stale_average)


class Watch:
    """Says each warning when it begins to hold, and again only after it has ceased to."""

    def __init__(self) -> None:
        self._holding: set[Warn] = set()

    def new_warnings(self, entries: Entries) -> list[str]:
        """The lines of warnings that hold since this entry. entries: the run's so far, oldest first."""
        recent = entries[-HISTORY - IN_A_ROW - 1 :]
        lines = {warn: warn(recent) for warn in WARNINGS}
        fresh = [line for warn, line in lines.items() if line is not None and warn not in self._holding]
        self._holding = {warn for warn, line in lines.items() if line is not None}
        return fresh


def _series(entries: Entries, name: str) -> list[float]:
    """The finite values of a quantity, in order."""
    return [float(entry[name]) for entry in _having(entries, name)]


def _having(entries: Entries, name: str) -> list[Mapping[str, Any]]:
    """The entries with a finite value of a quantity; others, such as those of a validation, are passed over."""
    return [entry for entry in entries if entry.get(name) is not None and math.isfinite(entry[name])]
