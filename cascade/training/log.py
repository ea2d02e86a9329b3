"""The log of a run: one JSON line per interval, with the same values for accelerate's trackers."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from cascade.checkpoint import write_text, writing
from cascade.errors import StorageError
from cascade.files.parsed import parse_json
from cascade.files.text import open_regular

BAND_EDGES = (-6.0, -3.0, 0.0, 3.0, 6.0)
"""Log SNR at the edges of the noise bands of the loss: from almost noise to almost clean."""
MEASURED = ("images_per_second", "data_wait_share", "memory_gigabytes")
"""Values that depend on the clock and the machine; all others are equal in bits when a run is repeated."""

Sums = dict[str, tuple[float, int]]
"""Sum and count of each quantity."""


def band_names() -> list[str]:
    """`loss/log_snr<-6`, `loss/log_snr-6..-3`, ..., `loss/log_snr>6`."""
    inner = [f"{low:g}..{high:g}" for low, high in pairwise(BAND_EDGES)]
    return [f"loss/log_snr{band}" for band in [f"<{BAND_EDGES[0]:g}", *inner, f">{BAND_EDGES[-1]:g}"]]


_BANDS = band_names()


class Meter:
    """Means over the steps since the last entry. `sums` is its state except for the clock, and saved in checkpoints."""

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        """sums: saved in a checkpoint, so that the next entry of a resumed run equals that of an uninterrupted one."""
        self.sums: Sums = {name: (float(total), int(count)) for name, (total, count) in (sums or {}).items()}
        self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def add_losses(self, losses: Sequence[float], log_snrs: Sequence[float]) -> None:
        """Loss and log SNR of every picture of all processes."""
        by_band: dict[str, list[float]] = {}
        for loss, log_snr in zip(losses, log_snrs, strict=True):
            by_band.setdefault(_BANDS[bisect_right(BAND_EDGES, log_snr)], []).append(loss)
        for name, values in (("loss", losses), *by_band.items()):
            total, count = self.sums.get(name, (0.0, 0))
            for value in values:  # one by one: equal bits for any number of steps read at a time
                total += value
            self.sums[name] = (total, count + len(values))
        self._images += len(losses)

    def add(self, name: str, value: float) -> None:
        """One value of a quantity."""
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + value, count + 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context that measures the time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def means(self) -> dict[str, float]:
        """The mean of each quantity. Bands without a picture are left out."""
        order = ["loss", *_BANDS]
        names = [*(name for name in order if name in self.sums), *(name for name in self.sums if name not in order)]
        return {name: self.sums[name][0] / self.sums[name][1] for name in names}

    def measured(self, device: torch.device) -> dict[str, float]:
        """The values of `MEASURED`. No rates before the first step of a resumed run."""
        memory = {"memory_gigabytes": memory_bytes(device) / 1e9}
        if not self._images:
            return memory
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"images_per_second": self._images / seconds, "data_wait_share": self._waited / seconds, **memory}


def memory_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a GPU; on a CPU the current memory of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


class RunLog:
    """log.jsonl of a run. On resume, entries after the checkpoint are dropped, so that no step occurs twice."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.entries = [entry for entry in read_entries(path) if entry["step"] <= resume_step]
        """Every entry so far."""
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one entry; numbers that are not finite, which JSON lacks, are written as null."""
        self.entries.append({"step": step, **{name: _finite(value) for name, value in values.items()}})
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(self.entries[-1], allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_LARGEST = 1e300


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, without unreadable lines, such as the last line of a killed run. Raises StorageError."""
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    return [entry for entry in map(_entry, lines) if entry is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not all(value is None or _is_number(value) for value in entry.values()):
        return None
    return entry if isinstance(entry.get("step"), int) else None


def _is_number(value: Any) -> bool:
    """One that can be compared and drawn; a whole number of JSON may have any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def flatten(values: Tensor) -> list[float]:
    """The numbers of a tensor as a list."""
    return [float(value) for value in values.detach().flatten().cpu()]
