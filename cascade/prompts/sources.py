"""Sources of prompts and their formats: a file of a kind given by its ending, captions, standard input."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from gzip import GzipFile
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from cascade.errors import CascadeError
from cascade.files.containers import BadRowError, parquet_errors
from cascade.files.containers import csv_rows as table_rows
from cascade.files.locks import ScratchTable
from cascade.files.paths import is_hidden
from cascade.files.text import NoFileError, NotTextError, lines_of, open_regular, parse_json, read_text
from cascade.prompts.records import BadLineError, check_header, from_text, utf8, without_nulls

# --- formats ---------------------------------------------------------------------------------------------------------
# Formats of prompt files: conversion of numbered lines, or of a table, to rows of values by column.

Lines: TypeAlias = Iterable[tuple[int, str]]
"""Line numbers and lines without their ends."""

Values: TypeAlias = "Mapping[str, Any] | BadLineError"
"""The values of a row by column, or the row's defect."""

Row: TypeAlias = tuple[int, Values]
"""(line number, values or defect)."""


def numbered_lines(file: BinaryIO) -> Lines:
    """Numbered lines without their ends; bytes that are not UTF-8 become lone surrogates. Raises NotTextError."""
    return enumerate(lines_of(file), start=1)


def text_rows(lines: Lines) -> Iterator[Row]:
    """One prompt per line."""
    for line, text in lines:
        if text.strip():
            yield line, {"prompt": text.strip()}


def json_rows(lines: Lines) -> Iterator[Row]:
    """One JSON string or object per line."""
    for line, text in lines:
        if not text.strip():
            continue
        try:
            value = parse_json(utf8(text))
        except BadLineError as error:
            yield line, error
        except json.JSONDecodeError as error:
            yield line, BadLineError(f"not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            yield line, BadLineError(f"not valid JSON: {error}")
        else:
            if isinstance(value, (str, dict)):
                yield line, {"prompt": value} if isinstance(value, str) else value
            else:
                yield line, BadLineError("expected a JSON string or object")


def csv_rows(lines: Lines, name: str, separator: str | None = None, conditions: Collection[str] = ()) -> Iterator[Row]:
    """Rows below a header that names the columns. An empty cell counts as missing.

    separator: the separator of cells; None: commas, semicolons or tabs, as in the header.
    Raises CascadeError, which begins with `name`, when the header is wrong, and for a quote that is not closed.
    """
    rows = table_rows((text for _, text in lines), name, separator)
    line, header = next(rows, (0, list[str]()))
    if isinstance(header, BadRowError):
        raise CascadeError(f"{name}:{line}: {header}")
    header = [cell.strip() for cell in header]
    if header:
        check_header(header, f"{name}:{line}", conditions)
    for line, cells in rows:
        yield line, BadLineError(str(cells)) if isinstance(cells, BadRowError) else _csv_row(header, cells)


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> Values:
    if len(cells) != len(header):
        return BadLineError(f"{len(cells)} cells, the header has {len(header)}")
    try:
        return {column: from_text(column, cell) for column, cell in zip(header, cells, strict=True) if cell.strip()}
    except BadLineError as error:
        return error


def parquet_rows(file: BinaryIO, name: str, conditions: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a Parquet file, in small batches. Raises CascadeError for a damaged file or a wrong header."""
    from pyarrow import parquet

    with parquet_errors(name):
        table = parquet.ParquetFile(file)
        check_header(table.schema_arrow.names, name, conditions)
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from enumerate(map(without_nulls, rows), start=1)


# --- counts on disk --------------------------------------------------------------------------------------------------
# Data about all lines of a prompt file, kept on disk so that memory use stays constant.


class Counts:
    """Counts of texts."""

    def __init__(self) -> None:
        self._table = ScratchTable("CREATE TABLE seen (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")

    def add(self, kind: str, text: str) -> int:
        """Add `text`; returns how often it was added before."""
        key = hashlib.sha256(f"{kind} {text}".encode()).digest()[:16]
        row = self._table.execute(
            "INSERT INTO seen VALUES (?, 0) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times", (key,)
        ).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Delete the counts."""
        self._table.close()


def in_order(names: Iterable[str]) -> Iterator[str]:
    """File names, sorted by their bytes."""
    with closing(ScratchTable("CREATE TABLE names (name BLOB)")) as table:
        table.fill("INSERT INTO names VALUES (?)", ((os.fsencode(name),) for name in names))
        for (name,) in table.execute("SELECT name FROM names ORDER BY name"):
            yield os.fsdecode(name)


# --- sources ---------------------------------------------------------------------------------------------------------

STANDARD_INPUT = "-"
_CAPTIONS = (".txt", ".caption")
_PARQUET = ".parquet"
_PACKED = ".gz"

PlacedRow: TypeAlias = tuple[str, Values]
"""(position, to append to the source's name; values or defect)."""


def rows_of(source: str, conditions: Collection[str] = ()) -> Iterator[PlacedRow]:
    """The rows of a source, read as needed. Raises CascadeError when it cannot be read, or its header is wrong.

    conditions: see `checked`.
    """
    if source != STANDARD_INPUT and Path(source).is_dir():
        yield from _folder_rows(Path(source), conditions)
        return
    for line, row in _numbered_rows(source, conditions):
        yield f":{line}", row


def count_prompts(source: str) -> int | None:
    """Approximate number of prompts of a source, bad lines included, for the time left; None if unknown."""
    path = Path(source)
    if source == STANDARD_INPUT or not path.exists():
        return None
    if path.is_dir():
        return sum(1 for _ in _captions(path)) or sum(_rows_in(str(path / name)) for name in _parts(path))
    if _ending(source) == _PARQUET:
        return _rows_in(source)
    with _open(source) as file:
        return sum(bool(line.strip()) for line in lines_of(file)) - (_ending(source) in (".csv", ".tsv"))


def _rows_in(source: str) -> int:
    """Number of rows of a Parquet file."""
    from pyarrow import parquet

    with parquet_errors(source):
        return int(parquet.read_metadata(source).num_rows)


def _ending(source: str) -> str:
    """The ending that gives a file's kind; for a compressed file, that of its content."""
    name = source.lower()
    return Path(name.removesuffix(_PACKED)).suffix


def _numbered_rows(source: str, conditions: Collection[str]) -> Iterator[Row]:
    if source == STANDARD_INPUT:
        with _readable("standard input"):
            yield from text_rows(numbered_lines(sys.stdin.buffer))
        return
    of_lines: dict[str, Callable[[Lines], Iterator[Row]]] = {
        ".txt": text_rows,
        ".jsonl": json_rows,
        ".ndjson": json_rows,
        ".csv": partial(csv_rows, name=source, conditions=conditions),
        ".tsv": partial(csv_rows, name=source, separator="\t", conditions=conditions),
    }
    ending = _ending(source)
    if ending not in of_lines and not source.lower().endswith(_PARQUET):
        raise CascadeError(
            f"{source}: unknown kind of prompt file; expected one of {', '.join(of_lines)} (also compressed: .gz),"
            " .parquet, a folder of captions or of Parquet files, or `-`"
        )
    with _open(source) as file:
        if ending == _PARQUET:
            yield from parquet_rows(file, source, conditions)
        else:
            yield from of_lines[ending](numbered_lines(file))


def _folder_rows(folder: Path, conditions: Collection[str]) -> Iterator[PlacedRow]:
    """The captions of a folder, or if it has none the rows of its Parquet files, in order of their names."""
    with _readable(str(folder)):
        has_captions = False
        for row in _caption_rows(folder):
            has_captions = True
            yield row
        for name in () if has_captions else in_order(_parts(folder)):
            for line, values in _numbered_rows(str(folder / name), conditions):
                yield f"/{name}:{line}", values


def _caption_rows(folder: Path) -> Iterator[PlacedRow]:
    """One prompt per .txt or .caption file, in order of names; its id is the file's name without the ending."""
    for name in in_order(_captions(folder)):
        yield f"/{name}", _caption(folder / name)


def _caption(path: Path) -> Values:
    try:
        text = read_text(path)
    except OSError as error:
        return BadLineError(f"cannot be read: {error.strerror or error}")
    except NotTextError as error:
        return BadLineError(str(error))
    return {"prompt": text.strip(), "id": path.stem}


def _captions(folder: Path) -> Iterator[str]:
    """Names of the caption files, unordered."""
    return _named(folder, _CAPTIONS)


def _parts(folder: Path) -> Iterator[str]:
    """Names of the Parquet files, unordered."""
    return _named(folder, (_PARQUET,))


def _named(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """Names with one of these endings, without hidden files, such as the `._a.txt` of a Mac."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        yield from (name for name in names if name.lower().endswith(endings) and not is_hidden(name))


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with _readable(path):
        try:
            file = open_regular(path)
        except NoFileError as error:
            raise CascadeError(f"{path}: cannot be read: {error.strerror}; pipe it to `-`, standard input") from None
        with file, GzipFile(fileobj=file) if path.lower().endswith(_PACKED) else nullcontext(file) as unpacked:
            yield cast("BinaryIO", unpacked)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged compressed file
        reason = error.strerror if isinstance(error, OSError) else None
        raise CascadeError(f"{path}: cannot be read: {reason or error}") from None
    except NotTextError as error:
        raise CascadeError(f"{path}: {error}") from None
