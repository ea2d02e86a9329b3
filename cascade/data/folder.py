"""Records of a folder: pictures, and captions in files next to them."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cascade.config.data import FolderSource
from cascade.data.records import (
    ALL,
    PICTURE_SUFFIXES,
    BadRecordError,
    Record,
    Wanted,
    caption_of_name,
    caption_variants,
)
from cascade.errors import CascadeError, quoted
from cascade.files.containers import BadRowError, csv_rows
from cascade.files.paths import Walk, walk
from cascade.files.text import NotTextError, parse_json, read_text

logger = logging.getLogger("cascade.data")

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
USUAL_COLUMN, OTHER_COLUMN = "caption", "text"
"""Column of captions in metadata files unless a setting names another, and the column read if that does not exist."""
SIDECARS = (".txt", ".TXT", ".caption", ".CAPTION")
MASK = "-masklabel"
"""End of the name, before its ending, of a picture's mask: OneTrainer's."""
_HELD_OUT = 16
_NOT_THERE = (errno.ENOENT, errno.ENAMETOOLONG)  # a name may become too long with another ending


class FolderRecords:
    """Pictures of a folder and its subfolders, sorted by path.

    Captions are read from every metadata.jsonl and metadata.csv that lists the picture by `file_name` (relative to that
    file), else from the .txt and .caption files of the same name, one per non-empty line. Several captions are
    variants. Hidden files and folders are skipped; problems: one line for each other file that cannot be read.
    """

    def __init__(
        self, config: FolderSource, suffixes: Collection[str] = PICTURE_SUFFIXES, wanted: Wanted = ALL
    ) -> None:
        folder, caption_column, split = Path(config.path), config.caption_column, config.split
        self._names, self._wanted = config.names, wanted
        found = files_of(folder)
        self.problems = found.problems
        if found.problems:
            count, first = len(found.problems), found.problems[0]
            logger.warning("data source %s: %d files left out, the first: %s", folder, count, first)
        self._listed: dict[Path, tuple[str, ...]] = {}
        self._values: dict[Path, tuple[dict[str, object], Path]] = {}
        for name in METADATA_NAMES:
            for path in (path for path in found.files if path.name == name):
                for picture, captions, values in _read_metadata(path, caption_column, wanted):
                    self._listed[picture] = tuple(dict.fromkeys((*self._listed.get(picture, ()), *captions)))
                    if wanted.columns:
                        self._values[picture] = ({**self._values.get(picture, ({},))[0], **values}, path.parent)
        pictures = {path for path in found.files if path.suffix.lower() in suffixes}
        self._masks = {
            _stem(path).removesuffix(MASK): path
            for path in (*found.files, *found.others)
            if config.masks and path.stem.endswith(MASK) and path.suffix.lower() in PICTURE_SUFFIXES
        }
        pictures -= set(self._masks.values())
        if config.masks and not self._masks:
            raise CascadeError(f"data source {folder}: masks: true, but no picture is called NAME{MASK}.png")
        if wanted.columns and not self._values:
            raise CascadeError(
                f"data source {folder}: no metadata.jsonl or metadata.csv with the columns of the stage's conditions,"
                f" {', '.join(wanted.columns.values())}"
            )
        # Pictures among the values of others' conditions are no records.
        everything = sorted((self._values.keys() if wanted.columns else pictures) | self._listed.keys())
        self._paths = [path for path in everything if split == "all" or is_held_out(path, folder) == (split != "train")]
        # Listed once, because looking for each ending of each picture costs as much as decoding a small one.
        self._sidecars = _by_stem(path for path in (*found.files, *found.others) if path.suffix in SIDECARS)
        if not everything:
            raise CascadeError(f"data source {folder}: no pictures; looked for {', '.join(sorted(suffixes))}")
        if not self._paths:
            raise CascadeError(
                f"data source {folder}: split: {split} leaves none of {len(everything)} pictures; use all"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        values, folder = self._values.get(path, ({}, path.parent))
        if self._wanted.folder_condition is not None:
            values = {**values, self._wanted.folder_condition: path.parent.name}
        return Record(
            path, self._captions_of(path), str(path), values=values, folder=folder, mask=self._masks.get(_stem(path))
        )

    def captions(self) -> Iterator[tuple[str, ...]]:
        for path in self._paths:
            with suppress(BadRecordError):
                yield self._captions_of(path)

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        if path in self._listed:
            return self._listed[path]
        texts = map(_sidecar, self._sidecars.get(_stem(path), ()))
        variants = tuple(dict.fromkeys(variant for text in texts for variant in caption_variants(text.split("\n"))))
        return variants or (() if self._names == "none" else caption_variants(caption_of_name(path, self._names)))


def _by_stem(sidecars: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Caption files by their paths without endings, in the order of `SIDECARS`."""
    found: dict[str, tuple[Path, ...]] = {}
    for path in sorted(sidecars, key=lambda path: SIDECARS.index(path.suffix)):
        found[_stem(path)] = (*found.get(_stem(path), ()), path)
    return found


def _stem(path: Path) -> str:
    """The path without its ending, as text: hashing a `Path` takes longer than reading a small file."""
    return os.path.splitext(path)[0]  # noqa: PTH122 - ten times as fast


def is_held_out(picture: Path, folder: Path) -> bool:
    """Whether `split` holds a picture of `folder` out: one in sixteen, whatever else the folder contains."""
    try:
        name = picture.relative_to(folder).as_posix()
    except ValueError:  # listed in a metadata file, and outside the folder
        name = picture.name
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] % _HELD_OUT == 0


def files_of(folder: Path) -> Walk:
    """The files below a source's folder. Raises CascadeError when it is missing or cannot be read."""
    try:
        return walk(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise CascadeError(f"data source {folder}: no such folder") from None
    except OSError as error:
        raise CascadeError(f"data source {folder}: cannot be read: {error.strerror or error}") from None


def _sidecar(path: Path) -> str:
    """The text of a caption file; empty when there is none. Raises BadRecordError."""
    try:
        return read_text(path)
    except NotTextError as error:
        raise BadRecordError(str(path), str(error)) from None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return ""
        raise BadRecordError(str(path), f"cannot be read: {error.strerror or error}") from None


def _read_metadata(
    path: Path, caption_column: str, wanted: Wanted
) -> Iterator[tuple[Path, tuple[str, ...], dict[str, object]]]:
    """(picture, captions, values of conditions) of each line.

    Raises CascadeError for malformed lines and missing columns.
    """
    rows = list(_metadata_rows(path))
    columns = sorted({column for row in rows for column in row})
    if caption_column == USUAL_COLUMN and USUAL_COLUMN not in columns and OTHER_COLUMN in columns:
        caption_column = OTHER_COLUMN
    ways = {"file_name": ""} | {
        column: f"; name the column of condition {name}: columns of the data source"
        for name, column in wanted.columns.items()
    }
    if wanted.captions:
        ways |= {caption_column: "; name the captions' column: caption_column of the data source"}
    for column, way in ways.items():
        if rows and column not in columns:
            raise CascadeError(f"{path}: no column {quoted(column)}; the columns are {', '.join(columns)}{way}")
    for row in rows:
        if row.get("file_name"):
            # One name for each picture, for any spelling in a line: `./a.png`, `sub/../a.png`.
            name = os.path.normpath(str(row["file_name"]))
            yield path.parent / name, caption_variants(row.get(caption_column)), wanted.values(row)


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = read_text(path)
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except NotTextError as error:
        raise CascadeError(f"{path}: {error}") from None
    # Not `splitlines`, which also splits at rarer line ends that JSON allows inside a string.
    lines = text.split("\n")
    yield from _table(lines, path) if path.suffix == ".csv" else _objects(lines, path)


def _table(lines: list[str], path: Path) -> Iterator[dict[str, Any]]:
    rows = csv_rows(lines, str(path))
    header: list[str] | None = None
    for line, cells in rows:
        if isinstance(cells, BadRowError):
            raise CascadeError(f"{path}, line {line}: {cells}")
        if header is None:
            header = [cell.strip() for cell in cells]
        elif len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        else:
            raise CascadeError(
                f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)};"
                " quote a cell that contains a separator"
            )


def _objects(lines: list[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise CascadeError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise CascadeError(f'{path}, line {number}: expected an object such as {{"file_name": "a.png"}}')
        yield row
