"""A run on disk: its folder, and numbered, atomically written checkpoints, from which it continues bit for bit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cascade import system
from cascade.config.data import FORMAT_VERSION
from cascade.config.training import TrainConfig
from cascade.errors import CascadeError, StorageError
from cascade.files.atomic import atomic_folder, read_json, restore, write_json, write_text
from cascade.files.locks import holder_of, lock_file
from cascade.files.tensors import load_tensors, save_tensors
from cascade.files.text import NotTextError, open_regular, read_text
from cascade.settings import Noted, parse, read_yaml, to_yaml
from cascade.training.changes import check_changes, check_surroundings
from cascade.training.log import Sums

logger = logging.getLogger("cascade.training")
_FILES = ("network", "ema", "optimizer")
_META = "state"
"""Key, among the checksums of the files, of state.json's own checksum; earlier checkpoints lack it."""
_TEMPORARY = re.compile(r"\.(config\.yaml|log\.jsonl|stage|adapter|step-\d+(\.png)?)(\.old)?\.\w{8}$")
"""Temporary names under which `atomic_file` and `atomic_folder` write a run's files."""


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
    """The complete state of a run after `step` steps; data order and noise follow from the step and the seed.

    ema: averages of the trained weights; frozen ones are only in `network`.
    """

    step: int
    network: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meter: Sums = field(default_factory=dict)
    """The sums of the log's next entry so far, for a checkpoint between two entries."""
    processes: int = 1
    """Number of processes of the last step."""
    scaler: dict[str, float] = field(default_factory=dict)
    """fp16's loss scale, and the number of steps since it changed."""
    owes: bool = False
    """Whether the log entry, validation and grid that were due after the step are still missing."""


def save_state(output: Path, state: RunState, config: TrainConfig, keep: int) -> None:
    """Write a checkpoint, then delete all but the newest `keep`.

    Checkpoints of later steps are deleted too: they are damaged ones that a resume skipped, and would be the newest.
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
    _thin_out(output, state.step, keep)


def thin_out_resumed(output: Path, step: int, keep: int) -> None:
    """Remove what a failure left after the save of `step`: the resumed run may have nothing more to save.

    Nothing is removed beside a later checkpoint, which cannot be read now and perhaps can again.
    """
    if checkpoints(output)[-1:] == [_folder(output, step)]:
        _thin_out(output, step, keep)


def _thin_out(output: Path, step: int, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` up to `step`; a warning if the disk refuses."""
    try:
        begun_mark(output).unlink(missing_ok=True)
        _remove_but(output, step, keep)
    except OSError as error:  # what the run was for is saved
        logger.warning(
            "%s: an old checkpoint cannot be removed (%s); the next save or resume tries again",
            output,
            error.strerror or error,
        )


def _remove_but(output: Path, step: int, keep: int) -> None:
    """See `_thin_out`. Raises OSError, and then each checkpoint is whole or hidden."""
    folders = checkpoints(output)
    kept = [folder for folder in folders if folder <= _folder(output, step)][-keep:]
    for folder in folders:
        if folder not in kept:
            # Half of one must not be taken for whole: the name goes first.
            system.replace(folder, folder.with_name(f".{folder.name}.{secrets.token_hex(4)}"))
    for path in (output / "checkpoints").glob(".step-*"):
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path)


def newest(
    output: Path, config: TrainConfig, processes: int | None = None, unreadable: Collection[Path] = ()
) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are skipped with a warning.

    unreadable: checkpoints to leave out.

    None for a run that ended before its first checkpoint. Raises CascadeError when there is no run, when all
    checkpoints are damaged, and when a changed setting makes the checkpoint unusable. processes: number of processes of
    the resumed run; a changed number causes a warning, as does another torch version.
    """
    for folder in reversed(checkpoints(output)):
        if folder in unreadable:
            continue
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
            f"{output}: every checkpoint is damaged; to start again, delete {output / 'checkpoints'} and the results"
            " (stage, adapter), or set another output"
        )
    check_begun(output)
    return None


def read_state(folder: Path) -> RunState:
    """Read a checkpoint that `newest` has checked."""
    meta = read_json(folder / "state.json")
    parts: dict[str, Any] = {name: load_tensors(folder / f"{name}.safetensors") for name in _FILES}
    # Values that the first checkpoints of format 1 lack keep their defaults.
    parts |= {name: meta[name] for name in ("meter", "processes", "scaler", "owes") if name in meta}
    return RunState(meta["step"], **parts)


def load_newest(output: Path, config: TrainConfig) -> RunState:
    """The state in the `newest` checkpoint. Raises CascadeError like `newest`, and for a run without a checkpoint."""
    folder = newest(output, config)
    if folder is None:
        raise CascadeError(f"{output}: the run ended before its first checkpoint")
    return read_state(folder)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Lock a run's folder, at most until this process ends. Raises CascadeError when another process holds the lock.

    Two runs in one folder would delete each other's unfinished files. On a file system without locks, such as on some
    clusters, a warning is logged instead. A run that ends before it wrote anything leaves no folder behind.
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
    """Delete a run's folder if it contains only the lock."""
    with suppress(OSError):
        if list(output.iterdir()) == [lock]:
            lock.unlink()
            output.rmdir()


def remove_unfinished(output: Path) -> None:
    """Delete the unfinished files and folders of a killed run, recognized by their temporary names.

    A finished folder that a kill left under such a name is renamed back. The next start tries again to remove the rest.
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
    """A marker file in the checkpoints folder until the first checkpoint exists.

    It distinguishes a run that was killed between its first stage folder and its first checkpoint, which may start
    again, from a finished run whose checkpoints were deleted.
    """
    return output / "checkpoints" / ".begun"


def _folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / _name(step)


def _name(step: int) -> str:
    return f"step-{str(step).zfill(8)}"  # `:08d` would raise for a step that is not a number, in a damaged file


def _check(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises CascadeError if a file is damaged or cannot be read."""
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
    """The known conditions, apart from its settings, on which the bits of a run depend."""
    return {"torch": torch.__version__, "processes": processes}


def _meta_checksum(meta: Mapping[str, Any]) -> str:
    """The checksum of state.json's content without the checksums, independent of its formatting."""
    said = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- folder ----------------------------------------------------------------------------------------------------------
# A run's folder: recognizing the run's own files, and protecting all others from being overwritten.

SETTINGS = "config.yaml"
_SIGNS = {"stage": "stage.json", "adapter": "adapter_config.json"}
"""The file by which a folder of each name is recognized as a run's own."""


def check_new(output: Path) -> None:
    """Check a new run's folder. Raises CascadeError if it holds a run, or anything that the run would replace."""
    if checkpoints(output):
        raise CascadeError(f"{output}: already holds a run; continue it with --resume, or set another output")
    _check_beginning(output)


def check_begun(output: Path) -> None:
    """Raise CascadeError for a folder that holds no run to resume."""
    if not checkpoints(output) and not (output / SETTINGS).exists():
        raise CascadeError(f"{output}: no usable checkpoint to resume from; start the run without --resume")


def check_resumed(output: Path) -> None:
    """Check a resumed run's folder. Raises CascadeError for a file that the run would replace but did not write."""
    if not checkpoints(output):
        _check_beginning(output)
    for name, sign in _SIGNS.items():
        folder = output / name
        if folder.exists() and not (folder / sign).is_file():
            raise CascadeError(f"{folder}: exists, but is not a run's {name}; move it, or set another output")


def mark_begun(output: Path) -> None:
    """Mark the folder as a run's, whose files may exist before its first checkpoint."""
    if not checkpoints(output):
        begun_mark(output).parent.mkdir(exist_ok=True)
        begun_mark(output).touch()


def is_own_settings(path: Path) -> bool:
    """Whether a file contains settings as a run writes them: all settings, in order, without comments."""
    try:
        return read_text(path) == to_yaml(parse(TrainConfig, read_yaml(path), str(path)))
    except (OSError, NotTextError, CascadeError):
        return False


def write_settings(output: Path, config: TrainConfig) -> None:
    """Write a run's settings into its folder, unless a file that no run wrote has their name."""
    path = output / SETTINGS
    if path.exists() and not is_own_settings(path):
        logger.warning("%s: was not written by a run, left unchanged; checkpoints hold the settings", path)
    else:
        write_text(path, to_yaml(config))


def _check_beginning(output: Path) -> None:
    """Raise CascadeError for results of a run whose checkpoints are gone, and for files that no run wrote."""
    begun = is_own_settings(output / SETTINGS)
    for name in () if begun and begun_mark(output).exists() else _SIGNS:
        if (output / name).exists():
            raise CascadeError(
                f"{output / name}: exists, but its checkpoints are missing; set another output;"
                f" training.init_from={output} starts from its weights"
            )
    for name in () if begun else (SETTINGS, "log.jsonl", "samples", "checkpoints"):
        if (output / name).exists():
            raise CascadeError(f"{output / name}: exists, but is not from a run; set another output, or move it")
