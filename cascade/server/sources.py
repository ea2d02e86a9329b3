"""Pictures and masks uploaded for editing: checked, decoded once, and named by their content."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from cascade.batch.stores import place
from cascade.drawing.edit import Edit, digest_of
from cascade.errors import CascadeError, StorageError
from cascade.files.picture import read_rgb
from cascade.server.pictures import checked_size
from cascade.upscaling import read_mask, read_picture

MOST_BYTES = 1 << 30
"""Size limit of the folder; the least recently used picture is removed first."""
_DECODED_AT_ONCE = 2
_UPLOAD, _OF_THE_GALLERY = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")

Pixels: TypeAlias = np.ndarray[Any, Any]


class Sources:
    """Folder of uploaded pictures. An upload's name is the digest of its pixels, as a recipe records it.

    A gallery id is looked up in the gallery instead. No other name is accepted, so that no path from a request reaches
    the disk.
    """

    def __init__(
        self, folder: Path, temporary: Path, gallery: Callable[[str], bytes], most_bytes: int = MOST_BYTES
    ) -> None:
        """temporary: folder for half-written files. gallery: content of a picture by its id; raises KeyError."""
        self._folder, self._temporary, self._gallery, self._most = folder, temporary, gallery, most_bytes
        self._decoding = threading.BoundedSemaphore(_DECODED_AT_ONCE)
        self._lock = threading.Lock()

    def take(self, content: bytes) -> dict[str, Any]:
        """Store an uploaded picture; returns its name, width and height. Raises CascadeError for a refused picture."""
        pixels = self._decoded(content)
        name = digest_of(read_picture(pixels)[0])
        self._store(name, pixels)
        return {"name": name, "width": pixels.shape[1], "height": pixels.shape[0]}

    def take_mask(self, pixels: Pixels) -> str:
        """Store a mask, (H, W) uint8, 255 where the picture is redrawn; returns its name."""
        name = digest_of(read_mask(pixels))
        self._store(name, pixels)
        return name

    def keep(self, edit: Edit) -> None:
        """Store the picture and the mask of an edit under the names in its recipe, so that it can be drawn again."""
        pixels = edit.image.permute(1, 2, 0).contiguous().numpy()
        self._store(digest_of(edit.image), pixels)
        if edit.mask is not None:
            self._store(digest_of(edit.mask), (edit.mask * 255).round().to(torch.uint8).numpy())

    def picture(self, name: str, field: str = "image") -> Pixels:
        """(H, W, 3) uint8. Raises CascadeError for an unknown name. field: for messages."""
        return self._decoded(self.content(name, field))

    def mask(self, name: str) -> Pixels:
        """(H, W) uint8. Raises CascadeError for an unknown name."""
        return np.array(Image.fromarray(self.picture(name, "mask")).convert("L"))

    def content(self, name: str, field: str = "image") -> bytes:
        """The file. Raises CascadeError for an unknown name."""
        try:
            if _OF_THE_GALLERY.fullmatch(name):
                return self._gallery(name)
            if _UPLOAD.fullmatch(name):
                path = self._path(name)
                os.utime(path)
                return path.read_bytes()
        except (KeyError, FileNotFoundError):
            pass
        raise CascadeError(f"{field}: no such picture here; upload it (again) and use the name in the response")

    def _decoded(self, content: bytes) -> Pixels:
        checked_size(content)
        with self._decoding:
            return np.array(read_rgb(io.BytesIO(content), "the picture"))

    def _store(self, name: str, pixels: Pixels) -> None:
        path = self._path(name)
        try:
            if path.exists():
                os.utime(path)
                return
            buffer = io.BytesIO()
            with self._decoding:
                Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
            place(path, buffer.getvalue(), self._temporary)
            self._make_room(path)
        except OSError as error:
            raise StorageError(f"{self._folder}: cannot be written: {error.strerror or error}") from None

    def _make_room(self, newest: Path) -> None:
        with self._lock:
            files = sorted(self._folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
            size = sum(path.stat().st_size for path in files)
            for path in files:
                if size <= self._most:
                    return
                if path != newest:
                    size -= path.stat().st_size
                    path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.png"
