"""Atomic saving and loading: a file or folder exists whole or not at all. Weights are safetensors only."""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from cascade.files.text import json_text, open_regular
from cascade.quoting import quoted
from cascade.settings import parse

_ASIDE = ".old."
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
        temporary = fresh_file(path.parent, f".{path.name}.")
        permissions = temporary.stat().st_mode & 0o777
        try:
            yield temporary
            temporary.chmod(permissions)  # safetensors creates its own file, which only the owner may read
            system.sync(temporary)
            system.replace(temporary, path)
            system.sync(path.parent)
        finally:
            with suppress(OSError):  # after the rename nothing is left to remove
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; on success every file is synced and the folder takes the name `path`.

    An existing folder is exchanged for it in one operation. Where the system has none, the existing folder is renamed
    first, and renamed back after a failure; after a kill between the two, `restore` finds it.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        restore(path)
        temporary = _fresh(path.parent, f".{path.name}.", lambda free: free.mkdir())
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                system.sync(file)
            system.sync(temporary)
            if not path.exists():
                system.replace(temporary, path)
            elif not system.exchange(temporary, path):
                _put_in_place(temporary, path)
            system.sync(path.parent)
        finally:
            discard(temporary)


def _put_in_place(new: Path, path: Path) -> None:
    """Two renames: the folder at `path` is moved into a hidden one, and `new` takes its name."""
    aside = _fresh(path.parent, f".{path.name}{_ASIDE}", lambda free: free.mkdir())
    try:
        system.replace(path, aside / path.name)
        try:
            system.replace(new, path)
        except OSError:
            system.replace(aside / path.name, path)
            raise
    finally:
        if path.exists():
            discard(aside)


def restore(path: Path) -> None:
    """Rename a folder back that a kill left in a hidden one, unless its successor has the name."""
    for aside in sorted(path.parent.glob(f".{glob.escape(path.name)}{_ASIDE}*")):
        if not path.exists() and (aside / path.name).is_dir():
            system.replace(aside / path.name, path)
        if path.exists():
            discard(aside)


def discard(path: Path) -> None:
    """Remove a file, link or folder as far as it can be."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def fresh_file(folder: Path, prefix: str = "") -> Path:
    """An empty file with an unused name and the permissions that the umask allows. Raises OSError."""
    return _fresh(folder, prefix, lambda free: free.touch(exist_ok=False))


def _fresh(folder: Path, prefix: str, make: Callable[[Path], None]) -> Path:
    while True:
        free = folder / f"{prefix}{secrets.token_hex(4)}"
        with suppress(FileExistsError):
            make(free)
            return free


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
        open_regular(path).close()  # of a pipe the library would wait for more
        return load_file(path)
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's own, of a file that cannot be mapped
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context for writing to `path`: a full disk or a folder without permission becomes a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        reason = error.strerror if isinstance(error, OSError) else None
        raise StorageError(f"{path}: cannot be written: {reason or error}") from error
