"""Storage of pictures between two stages."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.checkpoint import atomic_file
from cascade.errors import StorageError
from cascade.files.text import open_regular


class Shelf:
    """Pictures on their way from one stage to the next: in memory, or in files that a restart finds again.

    A missing or damaged file raises StorageError and is removed: the next start draws it again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held if self._folder is None else self._path(key).exists()

    def put(self, key: str, pixels: Tensor) -> None:
        """Store a picture. pixels: (C, H, W) as stored."""
        if self._folder is None:
            self._held[key] = pixels
        else:
            with atomic_file(self._path(key)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels.numpy())

    def get(self, key: str) -> Tensor:
        """A stored picture, (C, H, W)."""
        return self._held[key] if self._folder is None else _read(self._path(key))

    def drop(self, key: str) -> None:
        """Remove a picture, if it is stored."""
        self._held.pop(key, None)
        if self._folder is not None:
            with suppress(OSError):  # it costs disk, no picture
                self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.npy"


def _read(path: Path) -> Tensor:
    try:
        with open_regular(path) as file:
            pixels = torch.from_numpy(np.load(file, allow_pickle=False))
        if pixels.dtype not in (torch.uint8, torch.uint16, torch.float32) or pixels.ndim != 3:
            raise ValueError("no picture")
    except (OSError, ValueError, EOFError) as error:
        with suppress(OSError):
            path.unlink()
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        raise StorageError(f"{path}: cannot be read: {reason or error}; start again, and it is drawn again") from None
    return pixels
