"""Atomic writing: a file or folder exists whole or not at all."""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cascade import system
from cascade.errors import CascadeError, StorageError
from cascade.files.text import json_text, read_json_file

_ASIDE = ".old."


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context for writing to `path`: a full disk or a folder without permission becomes a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        reason = error.strerror if isinstance(error, OSError) else None
        raise StorageError(f"{path}: cannot be written: {reason or error}") from error
