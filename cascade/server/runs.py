"""Monitoring of training runs in a folder: progress, curves, sample grids, warnings, time left."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cascade.errors import CascadeError
from cascade.files.text import content_of, parse_json
from cascade.settings import read_yaml
from cascade.training.state import SETTINGS
from cascade.training.watch import HISTORY, IN_A_ROW, Watch, panels, read_curves, thinned

LOG = "log.jsonl"
_DEEPEST = 3  # levels of folders below the monitored one
_MOST = 200
_RECENT = 10  # entries that determine the speed
_SILENT_SECONDS, _SILENT_ENTRIES = 120.0, 5  # without an entry for both, a run counts as stopped
_GRID = re.compile(r"step-(\d+)\.png")


@dataclass
class _Known:
    """A parsed log. stamp: of its file when it was read."""

    stamp: tuple[float, int]
    entries: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)


class Runs:
    """Every run below a folder, by an id made from its path there: no path from a request reaches the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, _Known] = {}
        self._lock = threading.Lock()

    def every(self) -> list[dict[str, Any]]:
        """Progress of each run, the run with the newest entry first."""
        runs = [self._progress(path) for path in self._paths()]
        return sorted(runs, key=lambda run: -run["updated_at"])

    def get(self, id: str) -> dict[str, Any]:
        """Progress of one run, with its curves, warnings and the steps of its grids. Raises KeyError."""
        path = self._path(id)
        try:
            curves = {name: thinned(curve) for name, curve in read_curves(path).items()}
        except CascadeError:
            curves = {}
        grids = sorted(int(match[1]) for match in map(_GRID.fullmatch, _names(path / "samples")) if match)
        told = {"curves": curves, "panels": panels([curves]), "grids": grids, "warnings": self._read(path).warnings}
        return {**self._progress(path), **told}

    def grid(self, id: str, step: int) -> bytes:
        """The sheet of sample pictures after a step, a PNG. Raises KeyError."""
        try:
            return content_of(self._path(id) / "samples" / f"step-{step:08d}.png")
        except OSError:
            raise KeyError(step) from None

    def _progress(self, path: Path) -> dict[str, Any]:
        entries, settings = self._read(path).entries, _settings(path)
        training = settings.get("training", {})
        step, steps = (int(entries[-1]["step"]) if entries else 0), int(training.get("steps", 0))
        updated = _modified(path / LOG)
        pace = _seconds_a_step(entries, int(training.get("batch_size", 0)))
        over = steps > 0 and step >= steps
        patience = max(_SILENT_SECONDS, _SILENT_ENTRIES * (pace or 0.0) * int(training.get("log_every", 0)))
        running = not over and time.time() - updated < patience
        losses = [entry["loss"] for entry in entries if isinstance(entry.get("loss"), float)]
        stage = settings.get("stage", {})
        return {
            "id": _id(path.relative_to(self.folder)),
            "name": path.relative_to(self.folder).as_posix(),
            "stage": stage.get("name", "") if isinstance(stage, Mapping) else str(stage),
            "state": "done" if over else "running" if running else "stopped",
            "step": step,
            "steps": steps,
            "loss": losses[-1] if losses else None,
            "seconds_left": (steps - step) * pace if running and pace is not None else None,
            "updated_at": updated,
            "warned": len(self._read(path).warnings),
        }

    def _read(self, path: Path) -> _Known:
        """The log, parsed again if it has changed."""
        with self._lock:
            try:
                status = (path / LOG).stat()
                stamp = (status.st_mtime, status.st_size)
                if path not in self._known or self._known[path].stamp != stamp:
                    entries = [entry for entry in map(_entry, content_of(path / LOG).split(b"\n")) if entry]
                    self._known[path] = _Known(stamp, entries, list(_warnings(entries)))
            except OSError:
                self._known[path] = _Known((0.0, 0))
            return self._known[path]

    def _paths(self) -> list[Path]:
        """Folders that hold a log, near ones first."""
        found: list[Path] = []
        waiting = [(self.folder, 0)]
        while waiting and len(found) < _MOST:
            path, depth = waiting.pop(0)
            if (path / LOG).is_file():
                found.append(path)
            elif depth < _DEEPEST:
                waiting += [(path / name, depth + 1) for name in _names(path) if not name.startswith(".")]
        return found

    def _path(self, id: str) -> Path:
        for path in self._paths():
            if _id(path.relative_to(self.folder)) == id:
                return path
        raise KeyError(id)


def _id(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if not path.is_symlink())
    except OSError:
        return []


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _settings(path: Path) -> dict[str, Any]:
    """The settings of a run, unchecked; {} if the file does not hold a mapping."""
    try:
        settings = read_yaml(path / SETTINGS)
    except CascadeError:
        return {}
    training = settings.get("training")
    numbers = {
        name: value
        for name, value in (training.items() if isinstance(training, Mapping) else ())
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
    }
    return {**settings, "training": numbers}


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
        return entry if isinstance(entry["step"], int) and not isinstance(entry["step"], bool) else None
    except (ValueError, KeyError, TypeError):
        return None


def _seconds_a_step(entries: Sequence[Mapping[str, Any]], batch_size: int) -> float | None:
    """Mean seconds per step in the last entries with a speed."""
    paces = [entry.get("images_per_second") for entry in entries[-_RECENT:]]
    known = [float(pace) for pace in paces if isinstance(pace, int | float) and pace > 0]
    return batch_size / median(known) if known and batch_size else None


def _warnings(entries: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The warnings that training printed, read from its log again: {"step", "text"}."""
    watch, span = Watch(), HISTORY + IN_A_ROW + 1
    for end in range(1, len(entries) + 1):
        try:
            texts = watch.new_warnings(entries[max(0, end - span) : end])
        except TypeError:
            continue  # values that are no numbers
        for text in texts:
            yield {"step": entries[end - 1]["step"], "text": text}
