"""Files of many records (CSV, Parquet and tar), read strictly: no defect of a file loses rows silently."""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError
from cascade.files.text import open_regular

# --- CSV -------------------------------------------------------------------------------------------------------------
# CSV, read strictly: no part of a cell is lost, and no unclosed quote swallows rows silently.

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""Possible separators of cells: the one that is most frequent in the header is used."""


class BadRowError(ValueError):
    """A defect of one row; the rows after it can still be read."""


def csv_rows(
    lines: Iterable[str], name: str, separator: str | None = None
) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """(the row's first line number, its cells or its defect); the first row is the header.

    lines: without line ends. separator: the separator of cells; None: the header's. Blank rows are left out.
    Raises CascadeError, which begins with `name` and a line, for a quoted cell that does not end: which of the rows
    below belong to it cannot be determined.
    """
    numbered = _Numbered(lines, separator)
    reader = csv.reader(numbered, delimiter=numbered.separator, strict=True)
    while True:
        numbered.begin_row()
        row: list[str] | BadRowError
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if len(numbered.row) > 1:
                raise _unclosed(name, numbered) from None
            hint = _HINT if '"' in numbered.row[0] else ""
            row = BadRowError(f"not valid CSV: {error}{hint}")
        if isinstance(row, BadRowError) or any(cell.strip() for cell in row):
            yield numbered.first, row


def separator_of(header: str) -> str:
    """The separator of a header's cells."""
    return max(SEPARATORS, key=header.count)


_HINT = "; a quoted cell must end with a quote, and a quote inside it is written twice"


class _Numbered:
    """Lines for the csv module, with line ends, and a record of the lines of the current row."""

    def __init__(self, lines: Iterable[str], separator: str | None) -> None:
        self._lines = iter(lines)
        before = list[str]()
        while not (before and before[-1].strip()) and (line := next(self._lines, None)) is not None:
            before.append(line)
        self.separator = separator or separator_of(before[-1] if before else "")
        self._lines = chain(before, self._lines)
        self._read = 0
        self.begin_row()

    def begin_row(self) -> None:
        """Start a new row with the next line."""
        self.first, self.row = self._read + 1, list[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._read += 1
        self.row.append(line)
        return f"{line}\n"


def _unclosed(name: str, numbered: _Numbered) -> CascadeError:
    line = numbered.first + _line_of_quote("\n".join(numbered.row), numbered.separator)
    return CascadeError(
        f"{name}:{line}: the quote that begins a cell here is never closed; close it after the cell, and"
        " write a quote inside it twice"
    )


def _line_of_quote(row: str, separator: str) -> int:
    """The line of a row, counted from 0, on which the unclosed quoted cell begins."""
    whole = re.compile(rf'"(?:[^"]|"")*+"(?![^{separator}\n])|(?!")[^{separator}\n]*')
    place = 0
    while place < len(row) and (cell := whole.match(row, place)):
        place = cell.end() + 1
    return row.count("\n", 0, place)


# --- Parquet ---------------------------------------------------------------------------------------------------------
# The user's Parquet files: any defect is reported on one line that names file, column and row.

Kinds = Mapping[str, type | tuple[type, ...]]
"""The Python types of each column's cells."""

PICTURE = (bytes, dict)
"""A column of encoded pictures: bytes, or a struct with `bytes`, as `datasets` stores them."""

_WORDS = {str: "text", list: "a list", bytes: "a picture", dict: "a picture", int: "a whole number"}


def read_table(path: Path, kinds: Kinds, optional: Kinds | None = None) -> Any:
    """The columns of a file, as a pyarrow table. Raises CascadeError for a damaged file, or a missing column."""
    from pyarrow import parquet

    with parquet_errors(path):
        names = set(parquet.read_schema(path).names)
        missing = kinds.keys() - names
        if missing:
            raise CascadeError(f"{path}: has no column {min(missing)}; make it with scripts/prepare_data.py")
        return parquet.read_table(path, columns=[*kinds, *(name for name in optional or {} if name in names)])


def rows(table: Any, path: Path, kinds: Kinds, optional: Kinds | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table with checked cells; those of `optional` columns may be null or missing."""
    for number in range(len(table)):
        yield row_of(table, number, path, kinds, optional)


def row_of(table: Any, number: int, path: Path, kinds: Kinds, optional: Kinds | None = None) -> dict[str, Any]:
    """One row, counted from 0. Raises CascadeError for a cell of another type."""
    with parquet_errors(path):
        row: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
    for name, kind in {**kinds, **(optional or {})}.items():
        value = row.get(name)
        if not isinstance(value, kind) and (name in kinds or value is not None):
            expected = _WORDS[kind[0] if isinstance(kind, tuple) else kind]
            found = "null" if value is None else type(value).__name__
            raise CascadeError(f"{path}: row {number}: {name}: expected {expected}, found {found}")
    return row


def picture_bytes(cell: bytes | dict[str, Any]) -> bytes:
    """The encoded picture in a cell; empty if there is none."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else b""


@contextmanager
def parquet_errors(name: str | Path) -> Iterator[None]:
    """A context in which pyarrow's errors for damaged or other files become CascadeErrors."""
    from pyarrow import ArrowException

    try:
        yield
    except CascadeError:
        raise
    except FileNotFoundError:
        raise CascadeError(f"{name}: no such file") from None
    except (ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CascadeError(f"{name}: damaged, or not Parquet: {reason}") from None


# --- tar -------------------------------------------------------------------------------------------------------------
# Tar files of other people's: their members, as far as the headers can be true.

_DAMAGED = (tarfile.TarError, ValueError, OverflowError, LookupError, TypeError, RecursionError, MemoryError)
"""What the library raises for headers that nobody writes."""


class BadTarError(OSError):
    """Why a file is no tar that can be read in place; to stand behind its name, so without it."""


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in an uncompressed tar, in order. Raises OSError: BadTarError where its headers cannot be true.

    A size below zero would send the library back to where it was, for ever; a sparse member may claim to hold more
    than any memory, and has no place that could be read.
    """
    with open_regular(path) as file:
        length = path.stat().st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                last = -1
                while (member := tar.next()) is not None:
                    _check(member, last, length)
                    last = member.offset
                    if member.isfile():
                        yield member
        except _DAMAGED as error:
            raise BadTarError(" ".join(str(error).split()) or type(error).__name__) from None


def _check(member: tarfile.TarInfo, last: int, length: int) -> None:
    """last: where the header before begins. length: of the file."""
    if member.issparse():
        raise tarfile.ReadError("it holds sparse members")
    if member.offset <= last or member.size < 0 or (member.isreg() and member.offset_data + member.size > length):
        raise tarfile.ReadError("a member has a size that cannot be")
