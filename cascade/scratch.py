"""A table on the disk for the time of a run, by SQLite: a few MB of memory, whatever it holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cascade.errors import StorageError


class ScratchTable:
    """One table, in a temporary file that is gone when it is closed. Several threads may take turns with it."""

    def __init__(self, definition: str) -> None:
        """definition: SQL that makes the table."""
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": a temporary file
        for statement in ("PRAGMA synchronous = OFF", definition, "BEGIN"):
            self._database.execute(statement)

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """One statement. Raises CascadeError when the disk is full."""
        with _told():
            return self._database.execute(statement, values)

    def fill(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """One statement for each of `rows`. Raises CascadeError when the disk is full."""
        with _told():
            self._database.executemany(statement, rows)

    def close(self) -> None:
        """Remove the table."""
        self._database.close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"a temporary table cannot be written: {error}; name a folder with room for it in SQLITE_TMPDIR"
        ) from None
