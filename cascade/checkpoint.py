"""Atomic saving and loading: a file or folder exists whole or not at all. Weights are safetensors only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade import system
from cascade.config.common import FORMAT_VERSION
from cascade.config.data import TextReading
from cascade.config.stage import StageConfig
from cascade.errors import CascadeError, StorageError
from cascade.files.parsed import read_json_file
from cascade.files.text import json_text
from cascade.quoting import quoted
from cascade.settings import parse

_READING = "text"
"""Key of stage.json that is not a setting of the stage: how its training read text, as in a run's section `text`."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder to write to; on success it is synced and renamed to `path`.

    Raises CascadeError when the folder cannot be written or the disk is full; a file already at `path` is untouched.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            system.sync(temporary)
            system.replace(temporary, path)
            system.sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; on success every file is synced and the folder takes the name `path`.

    An existing folder is replaced. For a moment neither folder has the name; at no time does half a folder have it.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in sorted(temporary.rglob("*")):
                system.sync(file)
            system.sync(temporary)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                system.replace(path, old / path.name)
                system.replace(temporary, path)
                shutil.rmtree(old)
            else:
                system.replace(temporary, path)
            system.sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(data, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CascadeError when the file is missing or damaged, or holds no object."""
    try:
        data = read_json_file(path)
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CascadeError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CascadeError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write tensors as safetensors, atomically; floating ones as `dtype` if given."""
    plain = {
        name: tensor.detach()
        .to(device="cpu", dtype=dtype if tensor.is_floating_point() else None, copy=True)
        .contiguous()
        for name, tensor in tensors.items()
    }
    with atomic_file(path) as temporary:
        save_file(plain, temporary)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CascadeError when it is missing, truncated or of another format."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CascadeError(f"{path}: damaged, or not safetensors ({error}); copy or download it again") from None


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Fill a module, casting to its number format. Raises CascadeError naming a missing, extra or misshapen weight."""
    own = module.state_dict()
    check_names(own, tensors, f"{origin}: ")
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, assign=_on_meta(module))


def check_names(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Check that `tensors` have the names and shapes of a network's own weights.

    Raises CascadeError; its message begins with `origin` and names the first weight that differs.
    """
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is not in this network" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, this network has {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CascadeError(f"{origin}{min(problems)}{more}; the weights belong to other settings")


def save_stage(
    folder: str | Path,
    config: StageConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    reading: TextReading | None = None,
) -> None:
    """Write a stage folder: stage.json, the settings that rebuild it, and model.safetensors, as `dtype` if given.

    reading: how training read its text; stage.json records it if the network reads text.
    """
    noted = {} if reading is None or not config.model.reads_text else {_READING: reading.model_dump(mode="json")}
    with atomic_folder(folder) as temporary:
        write_json(temporary / "stage.json", {"format": FORMAT_VERSION, **config.model_dump(mode="json"), **noted})
        save_tensors(temporary / "model.safetensors", weights, dtype)


def read_stage_config(folder: str | Path) -> StageConfig:
    """The settings in a stage folder. Raises CascadeError for another format version or a wrong setting."""
    path = Path(folder) / "stage.json"
    data = read_json(path)
    check_format(path, data.pop("format", None))
    data.pop(_READING, None)
    return parse(StageConfig, data, str(path))


def read_stage_reading(folder: str | Path) -> TextReading | None:
    """How training read the stage's text, from its stage.json; None if an earlier version wrote the file."""
    path = Path(folder) / "stage.json"
    data = read_json(path)
    return parse(TextReading, data[_READING], f"{path}: {_READING}") if _READING in data else None


def check_format(path: str | Path, version: object) -> None:
    """Raises CascadeError unless a file's `format` is the one that this version of cascade reads."""
    if version != FORMAT_VERSION:
        raise CascadeError(
            f"{path}: format {quoted(version)}; this version of cascade reads format {FORMAT_VERSION}; use the version"
            " that wrote the file, or write it again with this one"
        )


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context for writing to `path`: a full disk or a folder without permission becomes a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        reason = error.strerror if isinstance(error, OSError) else None
        raise StorageError(f"{path}: cannot be written: {reason or error}") from error
