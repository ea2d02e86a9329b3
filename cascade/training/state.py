"""A run on disk: numbered checkpoints, whole or not there, from which it continues bit for bit."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoint import atomic_folder, load_tensors, read_json, save_tensors, write_json
from cascade.config import FORMAT_VERSION, TrainConfig
from cascade.errors import CascadeError

logger = logging.getLogger("cascade.training")
_FILES = ("network", "ema", "optimizer")


@dataclass(frozen=True)
class RunState:
    """Everything that a run is after `step` steps; data order and noise follow from the step and the seed."""

    step: int
    network: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_state(output: Path, state: RunState, config: TrainConfig, keep: int) -> None:
    """Write a checkpoint, then delete all but the newest `keep`.

    Later ones go too: they are the damaged ones that a resume skipped, and would count as the newest.
    """
    with atomic_folder(_folder(output, state.step)) as folder:
        for name in _FILES:
            save_tensors(folder / f"{name}.safetensors", getattr(state, name))
        sums = {name: _checksum(folder / f"{name}.safetensors") for name in _FILES}
        write_json(
            folder / "state.json",
            {
                "format": FORMAT_VERSION,
                "step": state.step,
                "torch": torch.__version__,
                "sha256": sums,
                "config": config.model_dump(mode="json"),
            },
        )
    folders = checkpoints(output)
    kept = [folder for folder in folders if folder <= _folder(output, state.step)][-keep:]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)


def load_newest(output: Path, config: TrainConfig) -> RunState:
    """The newest checkpoint whose checksums hold; damaged ones are skipped with a warning.

    Raises CascadeError when there is none, or when it was made by the other optimizer.
    """
    for folder in reversed(checkpoints(output)):
        try:
            state, saved_config = _read(folder)
        except CascadeError as error:
            logger.warning("%s: skipped, the checkpoint before it is used instead: %s", folder, error)
            continue
        for line in differences(saved_config, config.model_dump(mode="json")):
            if line.startswith("training.optimizer.kind:"):
                raise CascadeError(
                    f"{folder}: {line}: one optimizer cannot go on from the other's memory;"
                    f" start a new run with training.init_from={output}"
                )
            logger.warning("%s: setting changed since the checkpoint: %s", folder, line)
        return state
    raise CascadeError(f"{output}: no usable checkpoint to resume from; start the run without --resume")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(path for path in (output / "checkpoints").glob("step-*") if path.is_dir())


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """One line for each setting that differs, such as `training.batch_size: 16 -> 32`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old} -> {new}"


def _folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


def _read(folder: Path) -> tuple[RunState, dict[str, Any]]:
    meta = read_json(folder / "state.json")
    missing = {"format", "step", "sha256", "config"} - meta.keys()
    if missing:
        raise CascadeError(f"{folder / 'state.json'} lacks {min(missing)}")
    if meta.get("format") != FORMAT_VERSION:
        raise CascadeError(f"{folder}: format {meta.get('format')}, this version reads {FORMAT_VERSION}")
    tensors = {}
    for name in _FILES:
        path = folder / f"{name}.safetensors"
        if not path.exists() or _checksum(path) != meta["sha256"][name]:
            raise CascadeError(f"{path} is missing or does not match its checksum")
        tensors[name] = load_tensors(path)
    return RunState(meta["step"], **tensors), meta["config"]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
