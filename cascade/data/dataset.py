"""A record: a picture, still encoded, and its captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2"}
)
"""File endings of pictures. A picture that this Pillow cannot read is a bad record, which is counted and logged."""


EncodedPicture = bytes | Path | Image.Image | Tensor | np.ndarray[Any, Any] | list[Any] | None
"""Bytes or path of a file, a PIL picture, an array of values, also as nested lists, or stored values (C, H, W)."""


@dataclass(frozen=True)
class Record:
    """A stored picture (None: missing), its caption variants, and a name for messages.

    low: its smaller picture for super-resolution, where that is not the area mean. drawn: the picture was drawn for
    this view from its caption, which mirroring or moving the picture would make wrong.
    """

    image: EncodedPicture
    captions: tuple[str, ...]
    origin: str
    low: EncodedPicture = None
    drawn: bool = False


class BadRecordError(Exception):
    """An unusable record: a broken picture, or no caption. It is counted and skipped."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason = origin, reason


class Records(Protocol):
    """A finite collection."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecordError when its captions cannot be read."""

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every record with readable ones, without reading pictures."""


def caption_variants(value: object) -> tuple[str, ...]:
    """The non-empty strings in a caption or list of captions, stripped; anything else is ignored."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


def encoded_picture(value: object) -> EncodedPicture:
    """A picture's value in `datasets` or Parquet -> bytes, a path, a PIL picture or an array; else None."""
    if isinstance(value, dict):
        # `datasets` stores a struct: the bytes, or else the path.
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value if isinstance(value, (bytes, Path, Image.Image, np.ndarray, list)) else None
