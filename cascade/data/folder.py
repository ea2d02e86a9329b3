"""Records of a folder: pictures, and captions in files beside them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cascade.data.dataset import PICTURE_SUFFIXES, BadRecordError, Record, caption_variants
from cascade.errors import CascadeError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class FolderRecords:
    """Pictures of a folder and its subfolders, sorted by path.

    Captions come from a metadata.jsonl or metadata.csv with `file_name` (relative to it) where one lists the
    picture, else from the .txt file of the same name, in which each line that is not empty is a variant.
    """

    def __init__(self, folder: Path, caption_column: str) -> None:
        if not folder.is_dir():
            raise CascadeError(f"data source {folder}: no such folder")
        self._listed: dict[Path, tuple[str, ...]] = {}
        for name in METADATA_NAMES:
            for path in sorted(folder.rglob(name)):
                self._listed.update(_read_metadata(path, caption_column))
        files = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        pictures = {path for path in files if not path.is_dir()}
        self._paths = sorted(pictures | self._listed.keys())
        if not self._paths:
            raise CascadeError(f"data source {folder}: no pictures; looked for {', '.join(sorted(PICTURE_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        return Record(path, self._captions_of(path), str(path))

    def captions(self) -> Iterator[tuple[str, ...]]:
        for path in self._paths:
            with suppress(BadRecordError):
                yield self._captions_of(path)

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        if path in self._listed:
            return self._listed[path]
        for sidecar in (path.with_suffix(".txt"), path.with_suffix(".TXT")):
            try:
                return caption_variants(sidecar.read_text(encoding="utf-8-sig").splitlines())
            except FileNotFoundError:
                continue
            except UnicodeDecodeError:
                raise BadRecordError(str(sidecar), "not UTF-8") from None
            except OSError as error:
                raise BadRecordError(str(sidecar), f"cannot be read: {error.strerror}") from None
        return ()


def _read_metadata(path: Path, caption_column: str) -> dict[Path, tuple[str, ...]]:
    """Captions by picture path. Raises CascadeError for lines and columns that are not as they should be."""
    rows = list(_metadata_rows(path))
    columns = sorted({column for row in rows for column in row})
    for column in ("file_name", caption_column):
        if rows and column not in columns:
            raise CascadeError(f"{path}: no column {column!r}; there are {', '.join(columns)}")
    return {
        path.parent / str(row["file_name"]): caption_variants(row.get(caption_column))
        for row in rows
        if row.get("file_name")
    }


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CascadeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".csv":
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), restkey="")
        except csv.Error as error:
            raise CascadeError(f"{path}: not valid CSV: {error}") from None
        return
    # Not `splitlines`, which also cuts at the rarer line ends that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CascadeError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise CascadeError(f'{path}, line {number}: expected an object such as {{"file_name": "a.png"}}')
        yield row
