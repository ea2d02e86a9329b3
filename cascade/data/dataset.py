"""A record: a picture, still encoded, and its captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2"}
)
"""What is taken for a picture. One that this Pillow cannot read is a bad record: counted, and named."""


EncodedPicture = bytes | Path | Image.Image | Tensor | None
"""Bytes or the path of a file, a picture of PIL, or uint8 (3, H, W), decoded already."""


@dataclass(frozen=True)
class Record:
    """A picture as it is stored (None: there is none), its caption variants, and a name for messages.

    low: its smaller picture for super-resolution, where that is not the area mean. drawn: made for this one view, as
    its caption says, to the edge: mirroring or moving it would make the caption wrong.
    """

    image: EncodedPicture
    captions: tuple[str, ...]
    origin: str
    low: EncodedPicture = None
    drawn: bool = False


class BadRecordError(Exception):
    """A record that gives no view: a broken picture, or no caption. Counted and passed over."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")
        self.origin, self.reason = origin, reason


class Records(Protocol):
    """A finite collection."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecordError when its captions cannot be read."""

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every record that has readable ones, without touching pictures."""


def caption_variants(value: object) -> tuple[str, ...]:
    """The non-empty strings in a caption or list of captions, stripped; anything else is no caption."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


def encoded_picture(value: object) -> EncodedPicture:
    """What `datasets` or Parquet give for a picture -> bytes, a path or a PIL picture; None for all else."""
    if isinstance(value, dict):
        # `datasets` stores a struct: the bytes, or where there are none the path.
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value if isinstance(value, (bytes, Path, Image.Image)) else None
