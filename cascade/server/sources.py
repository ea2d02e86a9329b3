"""Pictures on their way: uploaded for editing, sent in the requested form, and previews of unfinished ones."""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.batch.metadata import encode_image
from cascade.batch.stores import place
from cascade.conditions.settings import Value
from cascade.drawing.edit import Box, Edit, read_mask, read_picture, resized
from cascade.errors import CascadeError, StorageError
from cascade.files.text import content_of
from cascade.pictures.images import digest_of, downsample, to_float, to_pil, to_uint8
from cascade.pictures.reading import open_picture, over_white, picture_errors, read_rgb, straight

# --- pictures --------------------------------------------------------------------------------------------------------
# Received and sent pictures: checks before decoding, conversion to the requested size and format.

MOST_PIXELS_READ = 32 << 20
"""Most pixels of a received picture."""
_FORMATS = ("PNG", "JPEG", "WEBP")


def checked_size(content: bytes) -> tuple[int, int]:
    """Width and height in the header of a file, without decoding it. Raises CascadeError."""
    try:
        with open_picture(io.BytesIO(content), limited=False, formats=_FORMATS) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise CascadeError(f"not a readable picture: expected PNG, JPEG or WebP ({type(error).__name__})") from None
    if width * height > MOST_PIXELS_READ:
        raise CascadeError(f"the picture has more than {MOST_PIXELS_READ:,} pixels")
    return width, height


def from_base64(text: str) -> bytes:
    """The content of a file in base64, optionally as a data URL. Raises CascadeError."""
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except ValueError:
        raise CascadeError("a picture is not base64") from None


def transparency(content: bytes) -> np.ndarray[Any, Any] | None:
    """(H, W) uint8, 255 where a picture is transparent; None without an alpha channel. Raises CascadeError."""
    checked_size(content)
    with picture_errors("the picture"), open_picture(io.BytesIO(content)) as image:
        whole = straight(image)
    return 255 - np.asarray(whole.getchannel("A")) if whole.mode == "RGBA" else None


def as_sent(content: bytes, said: Mapping[str, Any], size: tuple[int, int] | None, format: str) -> bytes:
    """A picture of the gallery with its metadata: unchanged, or in another size or format.

    size: height and width, None: as drawn. format: png, webp or jpeg.
    """
    with picture_errors("the picture"), open_picture(io.BytesIO(content)) as image:
        wanted = image.size if size is None else size[::-1]
        if image.size == wanted and str(image.format).lower() == format:
            return content
        plain = over_white(straight(image))
    if plain.size != wanted:
        smaller = wanted[0] <= plain.width and wanted[1] <= plain.height
        plain = plain.resize(wanted, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return encode_image(plain, said, format)[0]


# --- sources ---------------------------------------------------------------------------------------------------------

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

    def keep_conditions(self, values: Mapping[str, Value]) -> None:
        """Store the pictures among the conditions of a drawing under the digests in its recipe."""
        for value in values.values():
            if isinstance(value, Tensor) and value.dtype == torch.uint8:
                pixels = value.permute(1, 2, 0).contiguous().numpy()
                self._store(digest_of(value), pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

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
                return content_of(path)
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


# --- previews --------------------------------------------------------------------------------------------------------
# Previews of unfinished pictures, small enough to be sent at every step.

LARGEST = 512
"""Longest side of a preview, in pixels; the finished picture is sent as a file."""
_QUALITY = 90


class Scene:
    """A reduced copy of an edited picture, into which previews of the redrawn part are placed."""

    def __init__(self, edit: Edit) -> None:
        self._small = None if edit.mask is None else _reduced(edit, edit.mask)

    def with_part(self, picture: Tensor) -> Tensor:
        """picture: (3, H, W), uint8 or float in about [-1, 1], of the redrawn part -> itself, or uint8 of the whole."""
        if self._small is None:
            return picture
        return self._small.finished((to_uint8(picture) if picture.is_floating_point() else picture).cpu())


def _reduced(edit: Edit, mask: Tensor) -> Edit:
    height, width = edit.image.shape[-2:]
    share = min(1.0, LARGEST / max(height, width))
    size = max(1, round(height * share)), max(1, round(width * share))
    box, scale = edit.box, (size[0] / height, size[1] / width)
    top, left = (min(int(at * by), side - 1) for at, by, side in zip((box.top, box.left), scale, size, strict=True))
    part = Box(
        top,
        left,
        max(1, min(round(box.height * scale[0]), size[0] - top)),
        max(1, min(round(box.width * scale[1]), size[1] - left)),
    )
    image = to_uint8(resized(to_float(edit.image)[None], size)[0])
    return Edit(image, resized(mask[None, None], size)[0, 0].clamp(0, 1), part)


def data_url(picture: Tensor) -> str:
    """A JPEG in a data URL, from (3, H, W), uint8 or float in about [-1, 1], on any device."""
    height, width = picture.shape[-2:]
    longest = max(height, width)
    if longest > LARGEST:
        pixels = to_float(picture) if not picture.is_floating_point() else picture.float()
        size = (max(1, height * LARGEST // longest), max(1, width * LARGEST // longest))
        picture = downsample(pixels[None], size)[0]
    buffer = io.BytesIO()
    to_pil(picture[None])[0].save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
