"""The true pictures of the art suite, read from prepared Parquet files: pictures, concepts, styles and words."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import CascadeError
from cascade.evaluation.tower import STYLES
from cascade.files.parquet import PICTURE, Kinds, picture_bytes, read_table, rows
from cascade.files.picture import open_picture, picture_errors
from cascade.images import from_pil

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
        digest.update(path.read_bytes())
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
