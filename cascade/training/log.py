"""The log of a run: one JSON line per interval, values that stay on the device until then, lines on progress."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from cascade.errors import StorageError
from cascade.files.atomic import write_text, writing
from cascade.files.text import open_regular, parse_json

if TYPE_CHECKING:
    from accelerate import Accelerator


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


# --- values on the device --------------------------------------------------------------------------------------------
# Values of steps that stay on the device until they are needed: reading one waits for all queued GPU work.

MOST_UNREAD = 100
"""Steps after which their values are read in any case: they take memory, and show a loss that is not finite."""


@dataclass(frozen=True)
class Unread:
    """The values of one step: loss and log SNR (B,) of this process' pictures, and the gradient norm of all processes.

    samples, captions: of the pictures.
    """

    step: int
    losses: Tensor
    log_snrs: Tensor
    norm: Tensor
    samples: Sequence[int]
    captions: Sequence[str]


@dataclass(frozen=True)
class Numbers:
    """The values after reading: `losses` and `log_snrs` of the pictures of all processes, process by process."""

    step: Unread
    own_losses: Tensor
    losses: list[float]
    log_snrs: list[float]
    norm: float


def read(steps: Sequence[Unread], accelerator: Accelerator) -> list[Numbers]:
    """The values of several steps, in order, read together. All processes together."""
    own = torch.stack([torch.stack([step.losses, step.log_snrs]) for step in steps])  # (steps, 2, B)
    gathered = accelerator.gather(own).cpu().unflatten(0, (-1, len(steps)))  # (processes, steps, 2, B)
    values = gathered.permute(1, 2, 0, 3).flatten(2).tolist()  # (steps, 2, B of all)
    norms = torch.stack([torch.as_tensor(step.norm) for step in steps]).tolist()
    mine = gathered[accelerator.process_index, :, 0]
    return [
        Numbers(step, own_losses, losses, log_snrs, norm)
        for step, own_losses, (losses, log_snrs), norm in zip(steps, mine, values, norms, strict=True)
    ]


# --- progress --------------------------------------------------------------------------------------------------------
# Lines on a run's progress where no bar is drawn: output to a file, or the log of a cluster's job.

SECONDS_BETWEEN = 20.0


class Spoken:
    """Turns entries of a run's log into lines, at most one every `SECONDS_BETWEEN`; the first and the last always."""

    def __init__(self, name: str, first: int, last: int, clock: Callable[[], float] = time.monotonic) -> None:
        """name: of the stage. first: the step that the run goes on after. last: of the run. clock: seconds."""
        self._name, self._first, self._last, self._clock = name, first, last, clock
        self._start = clock()
        self._spoken: float | None = None

    def line(self, step: int, values: Mapping[str, float]) -> str | None:
        """The line for an entry of the log, or None if the previous line is recent."""
        now = self._clock()
        if self._spoken is not None and step < self._last and now - self._spoken < SECONDS_BETWEEN:
            return None
        self._spoken = now
        parts = [f"{self._name}: step {step} of {self._last}", f"loss {values['loss']:.4f}"]
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} pictures/s")
        if step < self._last and step > self._first:
            parts.append(f"{duration((now - self._start) / (step - self._first) * (self._last - step))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time as people write it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
