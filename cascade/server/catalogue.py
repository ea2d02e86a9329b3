"""The pictures in all manifests of a folder, newest first, in a table on disk; and the traces kept with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.batch.manifest import read_line
from cascade.batch.plan import Target
from cascade.drawing.trace import Recorder
from cascade.drawing.trace_files import ANIMATION, SHEET, read_trace, write_trace
from cascade.files.locks import ScratchTable
from cascade.files.text import content_of, open_regular
from cascade.pipeline import CascadePipeline

_ORDER = "ORDER BY drawn DESC, id DESC"


@dataclass(frozen=True)
class Row:
    """A picture listed in a manifest. drawn: its time, in seconds since 1970."""

    id: str
    file: str
    drawn: float
    entry: dict[str, Any]


@dataclass
class _Read:
    """The part of a manifest that has been read. inode: of the file, which a run replaces at its end."""

    inode: int
    end: int = 0


def picture_id(entry: Mapping[str, Any]) -> str:
    """The public name of a picture, from its file and content, so that no path of a request reaches the disk."""
    return hashlib.sha256(f"{entry['file']} {entry['sha256']}".encode()).hexdigest()[:16]


class Catalogue:
    """The pictures of a folder, including those of other running programs. Usable from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, _Read] = {}
        self._lock = threading.RLock()
        self._table = ScratchTable(
            "CREATE TABLE pictures (id TEXT PRIMARY KEY, file TEXT, manifest TEXT, start INTEGER, length INTEGER,"
            " drawn REAL, words TEXT, starred INTEGER DEFAULT 0, deleted INTEGER DEFAULT 0)"
        )
        self._table.execute("CREATE INDEX by_time ON pictures (drawn, id)")

    def close(self) -> None:
        """Close the table."""
        self._table.close()

    def refresh(self, stars: Collection[str]) -> None:
        """Read the lines added to any manifest since the last call. stars: names of starred pictures."""
        with self._lock:
            for path in sorted(self._folder.glob("manifest*.jsonl")):
                self._refresh(path, stars)

    def find(self, id: str) -> Row | None:
        """A picture by its name."""
        return next(self._rows("WHERE id = ?", (id,)), None)

    def rows(self, words: list[str], starred: bool, before: str | None) -> Iterator[Row]:
        """The pictures with all words in prompt, id or seed. before: only older ones than this."""
        conditions, values = self._conditions(words, starred)
        with self._lock:
            known = self._table.execute("SELECT drawn FROM pictures WHERE id = ?", (before or "",)).fetchone()
        if known is not None:
            conditions.append("(drawn, id) < (?, ?)")
            values += [known[0], before]
        return self._rows(f"WHERE {' AND '.join(conditions)} {_ORDER}", tuple(values))

    def count(self, words: list[str], starred: bool) -> int:
        """The number of these pictures."""
        conditions, values = self._conditions(words, starred)
        statement = f"SELECT COUNT(*) FROM pictures WHERE {' AND '.join(conditions)}"
        with self._lock:
            return int(self._table.execute(statement, tuple(values)).fetchone()[0])

    def star(self, id: str, starred: bool) -> None:
        """Mark a picture as starred or not."""
        with self._lock:
            self._table.execute("UPDATE pictures SET starred = ? WHERE id = ?", (int(starred), id))

    def hide(self, id: str, hidden: bool) -> None:
        """Hide or show a picture; `find` still returns a hidden one."""
        with self._lock:
            self._table.execute("UPDATE pictures SET deleted = ? WHERE id = ?", (int(hidden), id))

    def _learn(self, row: Row, manifest: Path, start: int, length: int) -> None:
        """Add a picture. start, length: of its line in the manifest."""
        words = f"{row.entry.get('prompt', '')} {row.entry.get('id', '')} {row.entry.get('seed', '')}".lower()
        values = (row.id, row.file, str(manifest), start, length, row.drawn, words)
        with self._lock:
            self._table.execute(
                "INSERT INTO pictures (id, file, manifest, start, length, drawn, words) VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET manifest = excluded.manifest, start = excluded.start,"
                " length = excluded.length, drawn = excluded.drawn",
                values,
            )

    def _conditions(self, words: list[str], starred: bool) -> tuple[list[str], list[Any]]:
        conditions = ["deleted = 0", *["starred = 1"] * starred, *["instr(words, ?) > 0"] * len(words)]
        return conditions, [word.lower() for word in words]

    def _rows(self, where: str, values: tuple[Any, ...]) -> Iterator[Row]:
        with self._lock:
            statement = f"SELECT id, file, drawn, manifest, start, length FROM pictures {where}"
            cursor = self._table.execute(statement, values)
        while True:
            with self._lock:
                found = cursor.fetchone()
            if found is None:
                return
            id, file, drawn, *place = found
            entry = _line(*place)
            if entry is not None:
                yield Row(id, file, drawn, entry)

    def _refresh(self, path: Path, stars: Collection[str]) -> None:
        try:
            opened = open_regular(path)
        except OSError:
            return
        with opened as file:
            status = os.fstat(file.fileno())
            known = self._read.get(path)
            if known is None or known.inode != status.st_ino or status.st_size < known.end:
                self._table.execute("DELETE FROM pictures WHERE manifest = ?", (str(path),))
                known = self._read[path] = _Read(status.st_ino)
            file.seek(known.end)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # another process is writing it
                self._take(path, line, known.end, stars)
                known.end += len(line)

    def _take(self, path: Path, line: bytes, start: int, stars: Collection[str]) -> None:
        try:
            entry = read_line(line)
        except ValueError:
            return  # not a manifest line; the command line reports it when it resumes
        id, file = picture_id(entry), entry["file"]
        self._learn(Row(id, file, self._drawn(file, path), entry), path, start, len(line))
        if id in stars:
            self.star(id, True)

    def _drawn(self, file: str, manifest: Path) -> float:
        path = self._folder / stored_in(file)
        return (path if path.exists() else manifest).stat().st_mtime


def stored_in(file: str) -> str:
    """The file on disk for a file name of a manifest: the file itself, or its tar."""
    return file.partition("/")[0] if ".tar/" in file else file


def _line(manifest: str, start: int, length: int) -> dict[str, Any] | None:
    """A line of a manifest; None if the file has changed since it was read."""
    try:
        with open_regular(manifest) as file:
            file.seek(start)
            return json.loads(file.read(length))
    except (OSError, ValueError):
        return None


# --- traces ----------------------------------------------------------------------------------------------------------
# Traces requested by clients: folders by name, of which the newest are kept.

MOST = 30
"""Number of kept traces of 5 to 20 MB each."""


class Traces:
    """A folder of traces. Only requested names of 32 hexadecimal digits reach the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, target: Target, recorder: Recorder, pipeline: CascadePipeline) -> str:
        """Store a trace; returns its name, derived from the model and the recipe. Raises OSError."""
        digest = target.recipe.digest()
        name = hashlib.sha256(f"{pipeline.name} {digest}".encode()).hexdigest()[:32]
        recipe = target.recipe
        said = {"prompt": recipe.prompt, "seed": str(recipe.seed), "model": pipeline.name, "license": pipeline.license}
        write_trace(self._folder / name, recorder, said)
        for old in sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-MOST]:
            shutil.rmtree(old, ignore_errors=True)
        return name

    def get(self, name: str) -> dict[str, Any]:
        """The content of trace.json. Raises KeyError."""
        try:
            found: dict[str, Any] = read_trace(self._place(name))
        except (OSError, ValueError):
            raise KeyError(name) from None
        return found

    def file(self, name: str, file: str) -> bytes:
        """A picture listed in a trace. Raises KeyError."""
        steps = [step for stage in self.get(name)["stages"] for step in stage["steps"]]
        if file not in {SHEET, ANIMATION, *(own for step in steps for own in step["files"].values())}:
            raise KeyError(file)
        try:
            return content_of(self._place(name) / file)
        except OSError:
            raise KeyError(file) from None

    def _place(self, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise KeyError(name)
        return self._folder / name
