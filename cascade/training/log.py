"""What a run says while it goes: one JSON line per interval, and the same numbers to accelerate's trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade.checkpoint import write_text, writing

BAND_EDGES = (-6.0, -3.0, 0.0, 3.0, 6.0)
"""Log SNR between the noise bands of the loss: from almost noise to almost clean."""


def band_names() -> list[str]:
    """`loss/log_snr<-6`, `loss/log_snr-6..-3`, ..., `loss/log_snr>6`."""
    inner = [f"{low:g}..{high:g}" for low, high in pairwise(BAND_EDGES)]
    return [f"loss/log_snr{band}" for band in [f"<{BAND_EDGES[0]:g}", *inner, f">{BAND_EDGES[-1]:g}"]]


class Meter:
    """Means over the steps since the last entry."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._bands: list[list[float]] = [[] for _ in range(len(BAND_EDGES) + 1)]
        self._grad_norms: list[float] = []
        self._images = 0
        self._start = time.perf_counter()

    def add(self, losses: Sequence[float], log_snrs: Sequence[float], grad_norm: float) -> None:
        """One step: loss and log SNR of every picture of all processes, and the norm of the gradient."""
        self._losses += losses
        for loss, log_snr in zip(losses, log_snrs, strict=True):
            self._bands[sum(log_snr >= edge for edge in BAND_EDGES)].append(loss)
        self._grad_norms.append(grad_norm)
        self._images += len(losses)

    def summary(self) -> dict[str, float]:
        """The means, and pictures per second. Bands that saw no picture are left out."""
        seconds = time.perf_counter() - self._start
        bands = zip(band_names(), self._bands, strict=True)
        return {
            "loss": _mean(self._losses),
            **{name: _mean(values) for name, values in bands if values},
            "gradient_norm": _mean(self._grad_norms),
            "images_per_second": self._images / max(seconds, 1e-9),
        }


class RunLog:
    """log.jsonl of a run. On resume, entries after the checkpoint are dropped, so no step stands there twice."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one entry."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A killed run may leave half a line behind; whole ones end with a brace.
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def flatten(values: Tensor) -> list[float]:
    """The numbers of a tensor as a list."""
    return [float(value) for value in values.detach().flatten().cpu()]
