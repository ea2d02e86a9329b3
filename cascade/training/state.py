"""A run on disk: numbered checkpoints, whole or not there, from which it continues bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cascade import system
from cascade.checkpoint import atomic_folder, load_tensors, read_json, restore, save_tensors, write_json
from cascade.config.common import FORMAT_VERSION
from cascade.config.training import TrainConfig
from cascade.errors import CascadeError, StorageError
from cascade.locks import holder_of, lock_file
from cascade.settings import Noted, parse
from cascade.training.changes import check_changes, check_surroundings
from cascade.training.log import Sums

logger = logging.getLogger("cascade.training")
_FILES = ("network", "ema", "optimizer")
_META = "state"
"""Beside the checksums of the files, that of state.json itself; earlier checkpoints have none."""
_TEMPORARY = re.compile(r"\.(config\.yaml|log\.jsonl|stage|adapter|step-\d+(\.png)?)(\.old)?\.\w{8}$")
"""Names under which `atomic_file` and `atomic_folder` write what a run consists of."""


class _Meta(Noted):
    """What is read of a checkpoint's state.json."""

    format: int
    step: int = Field(ge=0, lt=1 << 53)
    sha256: dict[str, str]
    config: dict[str, Any]
    meter: dict[str, tuple[float, int]] = Field(default={})
    processes: int = Field(default=1, ge=1)
    scaler: dict[str, float] = Field(default={})
    owes: bool = False
    torch: str = ""


@dataclass(frozen=True)
class RunState:
    """Everything that a run is after `step` steps; data order and noise follow from the step and the seed.

    ema: of the weights that learn; frozen ones stand in `network` alone.
    """

    step: int
    network: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meter: Sums = field(default_factory=dict)
    """What the log's next entry already holds, where a checkpoint falls between two entries."""
    processes: int = 1
    """That made the last step."""
    scaler: dict[str, float] = field(default_factory=dict)
    """fp16's scale of the loss, and since when it holds."""
    owes: bool = False
    """Whether the log's entry, validation and grid that were due after the step are still to be made."""


def save_state(output: Path, state: RunState, config: TrainConfig, keep: int) -> None:
    """Write a checkpoint, then delete all but the newest `keep`.

    Later ones go too: they are the damaged ones that a resume skipped, and would count as the newest.
    """
    with atomic_folder(_folder(output, state.step)) as folder:
        for name in _FILES:
            save_tensors(folder / f"{name}.safetensors", getattr(state, name))
        meta = {
            "format": FORMAT_VERSION,
            "step": state.step,
            **_surroundings(state.processes),
            "meter": state.meter,
            "scaler": state.scaler,
            "owes": state.owes,
            "config": config.model_dump(mode="json"),
        }
        sums = {name: _checksum(folder / f"{name}.safetensors") for name in _FILES}
        write_json(folder / "state.json", {**meta, "sha256": {**sums, _META: _meta_checksum(meta)}})
    try:
        begun_mark(output).unlink(missing_ok=True)
        _thin_out(output, state.step, keep)
    except OSError as error:  # what the run was for is saved
        logger.warning(
            "%s: an old checkpoint cannot be removed (%s); the next save tries again", output, error.strerror or error
        )


def _thin_out(output: Path, step: int, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` up to `step`. Raises OSError, and then each is whole or hidden."""
    folders = checkpoints(output)
    kept = [folder for folder in folders if folder <= _folder(output, step)][-keep:]
    for folder in folders:
        if folder not in kept:
            # Half of one must not be taken for whole: the name goes first.
            system.replace(folder, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}"))
    for path in (output / "checkpoints").glob(".step-*"):
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path)


def newest(output: Path, config: TrainConfig, processes: int | None = None) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are skipped with a warning.

    None for a run that was begun and ended before its first checkpoint. Raises CascadeError when there is no run or
    only damaged checkpoints, and when a changed setting makes the checkpoint another run's. processes: that shall go
    on; another number than before is worth a warning, as is another torch version.
    """
    for folder in reversed(checkpoints(output)):
        try:
            meta = _check(folder)
        except CascadeError as error:
            logger.warning("%s: skipped: %s", folder, error)
            continue
        now = _surroundings(processes or meta.get("processes", 1))
        for line in (*check_changes(meta["config"], config, folder), *check_surroundings(meta, now, folder)):
            logger.warning("%s", line)
        return folder
    if checkpoints(output):
        raise CascadeError(
            f"{output}: every checkpoint is damaged; to begin anew, delete {output / 'checkpoints'} and what was made"
            " of them (stage, adapter), or set another output"
        )
    if not (output / "config.yaml").exists():
        raise CascadeError(f"{output}: no usable checkpoint to resume from; start the run without --resume")
    return None


def read_state(folder: Path) -> RunState:
    """A checkpoint that `newest` found sound."""
    meta = read_json(folder / "state.json")
    parts: dict[str, Any] = {name: load_tensors(folder / f"{name}.safetensors") for name in _FILES}
    # What format 1 did not have from its beginning keeps its default.
    parts |= {name: meta[name] for name in ("meter", "processes", "scaler", "owes") if name in meta}
    return RunState(meta["step"], **parts)


def load_newest(output: Path, config: TrainConfig) -> RunState:
    """What `newest` finds, read. Raises CascadeError as it does, and for a run without any checkpoint."""
    folder = newest(output, config)
    if folder is None:
        raise CascadeError(f"{output}: the run ended before its first checkpoint")
    return read_state(folder)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Alone with a run's folder, until the end of this process at the latest. Raises CascadeError when another has it.

    Two runs in one folder would each remove what the other has begun to write. Where a file system has no locks, such
    as some of clusters, there is a warning instead. A run that ends before it wrote anything leaves no folder behind.
    """
    path = output / ".lock"
    with ExitStack() as lock:
        try:
            me = f"process {os.getpid()} on {socket.gethostname()}"
            lock.enter_context(lock_file(path, wait=False, holder=me))
        except BlockingIOError:
            who = holder_of(path) or "it has just begun"
            raise CascadeError(
                f"{output}: another run writes into this folder ({who}); wait for its end, or set another output"
            ) from None
        except OSError as error:
            raise StorageError(f"{output}: cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            _remove_unused(output, path)
    if system.OPEN_FILES_STAY:
        _remove_unused(output, path)


def _remove_unused(output: Path, lock: Path) -> None:
    """Delete a run's folder in which nothing lies but its lock."""
    with suppress(OSError):
        if list(output.iterdir()) == [lock]:
            lock.unlink()
            output.rmdir()


def remove_unfinished(output: Path) -> None:
    """Delete what a killed run had begun to write: files and folders under their temporary names, nothing else.

    A finished folder that a kill left aside gets its name back. What cannot be removed now is left to the next start.
    """
    for name in ("stage", "adapter"):
        restore(output / name)
    for folder in (output, output / "checkpoints", output / "samples"):
        for path in folder.glob(".*"):
            if not _TEMPORARY.match(path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(path for path in (output / "checkpoints").glob("step-*") if path.is_dir())


def begun_mark(output: Path) -> Path:
    """A file that stands where checkpoints will, until there is the first one.

    It tells a run that was killed between its first stage folder and its first checkpoint, and begins anew, from one
    that is finished and has lost its checkpoints.
    """
    return output / "checkpoints" / ".begun"


def _folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / _name(step)


def _name(step: int) -> str:
    return f"step-{str(step).zfill(8)}"  # `:08d` would raise for what a damaged file calls a step


def _check(folder: Path) -> dict[str, Any]:
    """What stands in a checkpoint's state.json. Raises CascadeError unless its files are as they were written.

    A disk that fails to read them is no other case: the checkpoint before may be sound.
    """
    try:
        return _sound(folder)
    except OSError as error:
        raise CascadeError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _sound(folder: Path) -> dict[str, Any]:
    meta = read_json(folder / "state.json")
    parse(_Meta, meta, str(folder / "state.json"))
    if meta.get("format") != FORMAT_VERSION:
        raise CascadeError(f"{folder}: format {meta.get('format')}, this version reads {FORMAT_VERSION}")
    for name in _FILES:
        path = folder / f"{name}.safetensors"
        if not path.exists() or _checksum(path) != meta["sha256"].get(name):
            raise CascadeError(f"{path} is missing or does not match its checksum")
    if _META in meta["sha256"] and _meta_checksum(meta) != meta["sha256"][_META]:
        raise CascadeError(f"{folder / 'state.json'} does not match its checksum")
    if folder.name != _name(meta["step"]):
        raise CascadeError(f"{folder / 'state.json'} is of step {meta['step']}; the folder was renamed")
    return meta


def _surroundings(processes: int) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings, as far as it can be told."""
    return {"torch": torch.__version__, "processes": processes}


def _meta_checksum(meta: Mapping[str, Any]) -> str:
    """Of all that state.json says but checksums, however its lines are broken."""
    said = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
