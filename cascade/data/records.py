"""A record (a picture, still encoded, and its captions), and the changes of captions that are made for each view."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from torch import Tensor

from cascade.conditions.settings import NumberCondition
from cascade.config.data import SourceConfig, WordingConfig
from cascade.config.stage import StageConfig

# --- dataset ---------------------------------------------------------------------------------------------------------
# A record: a picture, still encoded, and its captions.

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
    conditions by name, as stored; folder: of the relative paths among them. mask: for the loss, white where it counts.
    """

    image: EncodedPicture
    captions: tuple[str, ...]
    origin: str
    low: EncodedPicture = None
    drawn: bool = False
    values: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None
    mask: EncodedPicture = None


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


# --- wording ---------------------------------------------------------------------------------------------------------
# Changes to captions that are made for each view: templates, a trigger, and tags that move or are left out.

PLACE = "{}"
"""The caption's place in a template."""
PLAIN = WordingConfig()
"""Captions as they are."""
_END = re.compile(r"[\s_-]*\(?\d*\)?$")
_BETWEEN = re.compile(r"[\s_-]+")


def worded(caption: str, wording: WordingConfig, rng: random.Random) -> str:
    """A caption as a view has it. Without changes no random number is drawn."""
    if wording == PLAIN:
        return caption
    if wording.shuffle_tags or wording.tag_dropout:
        caption = _tags(caption, wording, rng)
    if wording.templates:
        caption = rng.choice(wording.templates).replace(PLACE, caption)
    return _triggered(caption, wording)


def wordings(caption: str, wording: WordingConfig) -> Iterator[str]:
    """Every wording of a caption, if tags stay as they are."""
    for template in wording.templates or (PLACE,):
        yield _triggered(template.replace(PLACE, caption), wording)


def has_endless_wordings(wording: WordingConfig) -> bool:
    """Whether `wordings` cannot list what `worded` makes."""
    return wording.shuffle_tags or wording.tag_dropout > 0


def caption_of_name(path: Path, part: str) -> str:
    """The words in the name of a file, or (part: folder) of the folder around it, without a number at the end."""
    name = path.stem if part == "file" else path.parent.name
    return _BETWEEN.sub(" ", _END.sub("", name)).strip()


def _triggered(caption: str, wording: WordingConfig) -> str:
    return caption if wording.trigger is None else f"{wording.trigger}, {caption}"


def _tags(caption: str, wording: WordingConfig, rng: random.Random) -> str:
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, rest = tags[: wording.keep_tags], tags[wording.keep_tags :]
    if wording.shuffle_tags:
        rng.shuffle(rest)
    kept = [tag for tag in rest if not wording.tag_dropout or rng.random() >= wording.tag_dropout]
    return ", ".join([*first, *kept]) or caption
