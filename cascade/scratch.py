"""A temporary table on disk (SQLite), in a few MB of memory however large it grows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cascade.errors import StorageError


class ScratchTable:
    """One table, in a temporary file that is deleted when it is closed. Threads may use it in turn."""

    def __init__(self, definition: str) -> None:
        """definition: SQL statement that creates the table."""
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": a temporary file
        for statement in ("PRAGMA synchronous = OFF", definition, "BEGIN"):
            self._database.execute(statement)

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement. Raises StorageError when the disk is full."""
        with _disk_errors():
            return self._database.execute(statement, values)

    def fill(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each of `rows`. Raises StorageError when the disk is full."""
        with _disk_errors():
            self._database.executemany(statement, rows)

    def close(self) -> None:
        """Remove the table."""
        self._database.close()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"a temporary table cannot be written: {error}; set SQLITE_TMPDIR to a folder with enough space"
        ) from None
