"""A record: a picture, still encoded, and its captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from torch import Tensor

from cascade.conditions import NumberCondition
from cascade.config.data import SourceConfig
from cascade.config.stage import StageConfig

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
    this view from its caption, which mirroring or moving the picture would make wrong. values: of the stage's
    conditions by name, as stored; folder: of the relative paths among them.
    """

    image: EncodedPicture
    captions: tuple[str, ...]
    origin: str
    low: EncodedPicture = None
    drawn: bool = False
    values: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """The parts of a source's records that a stage reads, in addition to the picture.

    columns: by condition. captions: whether it cannot do without them. folder_condition: see `FolderSource`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    captions: bool = True
    folder_condition: str | None = None

    @classmethod
    def of(cls, source: SourceConfig, stage: StageConfig) -> Self:
        """See the class."""
        named, folder = getattr(source, "columns", {}), getattr(source, "folder_condition", None)
        columns = {
            name: named.get(name, name)
            for name, config in stage.conditions.items()
            if name != folder and not (isinstance(config, NumberCondition) and config.measure)
        }
        return cls(columns, stage.model.reads_text, folder)

    def values(self, row: Mapping[str, object]) -> dict[str, object]:
        """The values of the conditions in a row of the source."""
        return {name: row.get(column) for name, column in self.columns.items()}


ALL = Wanted()
"""Pictures and captions."""


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
