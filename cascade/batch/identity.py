"""The identity of a model and of the software: a continued run must have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from cascade._version import __version__
from cascade.errors import CascadeError
from cascade.load.index import ModelIndex

_ENDS_BYTES = 1 << 16


def model_identity(index: ModelIndex) -> str:
    """A model's name and a digest of its files: settings in full; of weights the size, the beginning and the end."""
    digest = hashlib.sha256(str(index.max_text_length).encode())
    if index.text_padded or index.captions != "as_is":
        digest.update(f" padded={index.text_padded} {index.captions}".encode())
    if index.styles.default is not None:
        digest.update(f" styles={index.styles}".encode())
    for folder in (index.text_encoder, *index.stages):
        for path in _files(folder):
            digest.update(f"{folder.name}/{path.name} {path.stat().st_size}".encode())
            digest.update(_ends_of(path))
    return f"{index.name} {digest.hexdigest()[:12]}"


def _ends_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            beginning = file.read(_ENDS_BYTES)
            file.seek(max(0, path.stat().st_size - _ENDS_BYTES))
            return beginning + file.read(_ENDS_BYTES)
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}") from None


def weights_sha256(index: ModelIndex) -> str:
    """SHA-256 over all weights of a model, hexadecimal: the safetensors files of text encoder and stages, in full."""
    digest = hashlib.sha256()
    for folder in (index.text_encoder, *index.folders):
        for path in _files(folder):
            if path.suffix == ".safetensors":
                digest.update(f"{folder.name}/{path.name} {path.stat().st_size}".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def versions() -> str:
    """Versions of the software that draws; another version may change the last bits."""
    return f"cascade {__version__}, torch {torch.__version__}"


def _files(folder: Path) -> Iterable[Path]:
    """The model's files in a folder of cascade, or of DeepFloyd IF in diffusers' layout."""
    places = [folder, *(folder / name for name in ("unet", "scheduler", "tokenizer"))]
    found = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path for path in found if path.suffix in (".json", ".safetensors"))
