"""CSV, read strictly: no part of a cell is lost, and no unclosed quote swallows rows silently."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from cascade.errors import CascadeError

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
