"""True pictures of the art at any size, by id: prepared copies, or the data set's own files.

Pictures are decoded on access.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.files.parquet import PICTURE, Kinds, picture_bytes, read_table, row_of, rows
from cascade.files.picture import open_picture, picture_errors
from cascade.images import downsample, from_pil, to_float, to_uint8

ORIGINALS = ("", "emoji", "more")
"""Subfolders of the prepared folder that may contain files of the data set, or links to them."""
SPLITS = ("train", "validation", "test")
_COLUMNS: Kinds = {"id": str, "style": str}
_OPTIONAL: Kinds = {"caption_styled": str, "width": int, "height": int}
_IMAGE: Kinds = {"image": PICTURE}


@dataclass(frozen=True)
class Entry:
    """An available true picture: its caption, file and row."""

    id: str
    style: str
    prompt: str
    path: Path
    row: int


@dataclass(frozen=True)
class Shelf:
    """All true pictures with a copy of at least `size` px, by id."""

    size: int
    entries: dict[str, Entry]

    def pictures(self, ids: Sequence[str]) -> Tensor:
        """uint8 (N, 3, size, size): area means. Raises CascadeError for a damaged picture."""
        if not ids:
            return torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.stack([_decoded(self.entries[name], self.size) for name in ids])

    def of(self, style: str) -> list[str]:
        """The ids of a style's pictures, in order."""
        return sorted(name for name, entry in self.entries.items() if entry.style == style)


@lru_cache(maxsize=8)
def shelf(folder: Path, size: int) -> Shelf:
    """The pictures of `size` px or more in a folder: `<split>-<size>*.parquet` first, then the data set's files."""
    entries: dict[str, Entry] = {}
    for path, prepared in _files(folder, size):
        for row, record in enumerate(_records(path)):
            # The data set lists each picture's size; prepared files have it in their name.
            large = prepared or min(record.get("width") or 0, record.get("height") or 0) >= size
            if large and record["id"] not in entries:
                entries[record["id"]] = Entry(
                    record["id"], record["style"], record.get("caption_styled") or "", path, row
                )
    return Shelf(size, entries)


def _files(folder: Path, size: int) -> Iterator[tuple[Path, bool]]:
    """(path, whether it holds prepared copies of exactly this size)."""
    for split in SPLITS:
        for path in sorted(folder.glob(f"{split}-{size}*.parquet")):
            if path.stem.removeprefix(f"{split}-{size}")[:1] in ("", "-"):
                yield path, True
    for part in ORIGINALS:
        for split in SPLITS:
            for path in sorted((folder / part).glob(f"{split}*.parquet")):
                rest = path.stem.removeprefix(split)
                if not rest or (rest[0] == "-" and not rest[1:2].isdigit()):
                    yield path, False


def _records(path: Path) -> list[dict[str, Any]]:
    """Rows without their pictures. Raises CascadeError for a damaged file or one without the columns."""
    read_table(path, _IMAGE)  # raises now instead of after drawing
    return list(rows(read_table(path, _COLUMNS, _OPTIONAL), path, _COLUMNS, _OPTIONAL))


@lru_cache(maxsize=32)
def _encoded(path: Path) -> Any:
    """The encoded pictures of a file, as a table."""
    return read_table(path, _IMAGE)


def _decoded(entry: Entry, size: int) -> Tensor:
    row = row_of(_encoded(entry.path), entry.row, entry.path, _IMAGE)
    with (
        picture_errors(f"{entry.path}: {entry.id}"),
        open_picture(io.BytesIO(picture_bytes(row["image"]))) as image,
    ):
        picture = from_pil(image)
    if picture.shape[-2:] == (size, size):
        return picture
    return to_uint8(downsample(to_float(picture)[None], size))[0]
