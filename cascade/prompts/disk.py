"""Data about all lines of a prompt file, kept on disk so that memory use stays constant."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import closing

from cascade.scratch import ScratchTable


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
