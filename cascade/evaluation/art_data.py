"""The true pictures of the art suite: prepared Parquet files, and any size of a picture by its id."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import CascadeError
from cascade.evaluation.tower import STYLES
from cascade.files.containers import PICTURE, Kinds, picture_bytes, read_table, row_of, rows
from cascade.files.text import content_of
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8
from cascade.pictures.reading import open_picture, picture_errors

FLAGS = "Flags"
"""The group whose names do not describe the pictures."""

STYLE_PHRASES = (
    *(style.replace("_", " ") for style in STYLES),
    "emoji",
    "sticker",
    "flat vector icon",
    "glossy gradient icon",
    "soft 3d render",
    "black and white icon",
)
_SIZE = 64
_COLUMNS: Kinds = {"image": PICTURE, "id": str, "caption": str, "captions": list, "style": str, "group": str}


@dataclass(frozen=True)
class Concept:
    """One subject, drawn in up to six styles.

    key: its code points.  name: such as `red apple`.  words: the name and the keywords, without style words.
    """

    key: str
    name: str
    words: str
    group: str


@dataclass(frozen=True)
class Art:
    """Pictures of a split, each with its concept and style; N of them.

    pixels: (N, 3, 64, 64) uint8.  digest: SHA-256 of the files, in hexadecimal.
    """

    pixels: Tensor
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]
    digest: str

    def of(self, keys: Sequence[str]) -> Art:
        """The pictures of some concepts, by their keys."""
        wanted = set(keys)
        chosen = [index for index, concept in enumerate(self.concepts) if concept.key in wanted]
        return Art(
            self.pixels[chosen],
            tuple(self.concepts[index] for index in chosen),
            tuple(self.styles[index] for index in chosen),
            self.digest,
        )

    def distinct(self) -> list[Concept]:
        """Every concept once, in the order of the keys."""
        return sorted(set(self.concepts), key=lambda concept: concept.key)


def read_art(folder: str | Path, *splits: str) -> Art:
    """The 64 px art of some splits: `train`, `validation`, `test`. Raises CascadeError for a folder without it."""
    files = [path for split in splits for path in _files(Path(folder), split)]
    digest = hashlib.sha256()
    pixels: list[Tensor] = []
    concepts: dict[str, Concept] = {}
    keys, styles = [], []
    for path in files:
        digest.update(content_of(path))
        for row in _rows(path):
            key = row["id"].partition("-")[2]
            pixels.append(_pixels(row, path))
            styles.append(row["style"])
            keys.append(key)
            # Keywords may differ between styles, as captions were sampled; the first style's are used for all.
            concepts.setdefault(key, Concept(key, row["caption"], _words(row), row["group"]))
    if not pixels:
        raise CascadeError(f"--data {folder}: no pictures in {', '.join(path.name for path in files)}; make them again")
    return Art(torch.stack(pixels), tuple(concepts[key] for key in keys), tuple(styles), digest.hexdigest())


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted(folder.glob(f"{split}-64*.parquet"))
    if not found:
        raise CascadeError(
            f"--data {folder}: no {split}-64*.parquet; make the files with scripts/prepare_data.py and name"
            " their folder"
        )
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the art, in the file's order. Raises CascadeError for a damaged file or one without the columns."""
    yield from rows(read_table(path, _COLUMNS), path, _COLUMNS)


def _pixels(row: dict[str, Any], path: Path) -> Tensor:
    with picture_errors(f"{path}: {row['id']}"), open_picture(io.BytesIO(picture_bytes(row["image"]))) as image:
        pixels = from_pil(image)
        if pixels.shape[-2:] != (_SIZE, _SIZE):
            raise CascadeError(f"{path}: {row['id']}: {image.width}x{image.height}, expected {_SIZE}x{_SIZE}")
        return pixels


def _words(row: dict[str, Any]) -> str:
    """Name and keywords from the captions without a style word, each word list once."""
    texts = [text for text in row["captions"] if isinstance(text, str)]
    plain = [text for text in texts if not any(phrase in text.lower() for phrase in STYLE_PHRASES)]
    return ", ".join(dict.fromkeys([row["caption"], *plain]))


# --- art pictures ----------------------------------------------------------------------------------------------------
# True pictures of the art at any size, by id: prepared copies, or the data set's own files.
#
# Pictures are decoded on access.

ORIGINALS = ("", "emoji", "more")
"""Subfolders of the prepared folder that may contain files of the data set, or links to them."""
SPLITS = ("train", "validation", "test")
_COLUMNS_OF_PICTURES: Kinds = {"id": str, "style": str}
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
    for path, prepared in _files_of(folder, size):
        for row, record in enumerate(_records(path)):
            # The data set lists each picture's size; prepared files have it in their name.
            large = prepared or min(record.get("width") or 0, record.get("height") or 0) >= size
            if large and record["id"] not in entries:
                entries[record["id"]] = Entry(
                    record["id"], record["style"], record.get("caption_styled") or "", path, row
                )
    return Shelf(size, entries)


def _files_of(folder: Path, size: int) -> Iterator[tuple[Path, bool]]:
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
    return list(rows(read_table(path, _COLUMNS_OF_PICTURES, _OPTIONAL), path, _COLUMNS_OF_PICTURES, _OPTIONAL))


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
