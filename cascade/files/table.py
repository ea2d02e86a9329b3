"""Tables in text: CSV, read strictly. Nothing of a cell is lost, and no quote swallows rows without a word."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from cascade.errors import CascadeError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may stand between cells. The header decides: whichever it has most of."""


class BadRowError(ValueError):
    """What is wrong with one row, while those after it can be read."""


def csv_rows(
    lines: Iterable[str], name: str, separator: str | None = None
) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """(the line on which a row begins, its cells or what is wrong with it); the first one is the header.

    lines: without their ends. separator: what stands between cells; None: what the header has. Blank rows are left
    out. Raises CascadeError, which begins with `name` and a line, for a cell in quotes that does not end as one: which
    of the rows below belong to it cannot be known.
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
    """What stands between the cells of a header."""
    return max(SEPARATORS, key=header.count)


_HINT = "; a cell in quotes ends with one, and a quote inside it is written twice"


class _Numbered:
    """Lines for the library, which ends them, and which of them make the row at hand."""

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
        """What is read from now on belongs to another row."""
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
        f"{name}:{line}: the quote that begins a cell here is not followed by one that ends it; close the cell, and"
        " write a quote inside it twice"
    )


def _line_of_quote(row: str, separator: str) -> int:
    """On which line of a row, counted from 0, the cell in quotes begins that does not end as one."""
    whole = re.compile(rf'"(?:[^"]|"")*+"(?![^{separator}\n])|(?!")[^{separator}\n]*')
    place = 0
    while place < len(row) and (cell := whole.match(row, place)):
        place = cell.end() + 1
    return row.count("\n", 0, place)
