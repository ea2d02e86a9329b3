"""The manifest: one line of JSON per finished picture, appended atomically by one or several processes."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cascade import system
from cascade.drawing.recipe import Recipe
from cascade.errors import LONGEST, StorageError, quoted
from cascade.files.locks import ScratchTable, held
from cascade.files.text import check_regular, json_text, parse_json

logger = logging.getLogger("cascade.batch")
_CHUNK = 1 << 20


class Manifest:
    """An open manifest, indexed by a table on disk, so that its size takes no memory."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises StorageError when it cannot be written."""
        self.path = path
        try:
            self._file = check_regular(path).open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._mutex = threading.RLock()  # the drawing thread looks up entries while the writing thread appends
        self._read = 0
        self._tidy = True  # sorted, one line per picture
        self.spoilt = 0
        """Damaged lines. They are ignored, and `tidy` leaves them out."""
        self._last_spoilt = b""
        self._last = (-1, -1)
        self._table = ScratchTable(
            "CREATE TABLE finished (line INTEGER, number INTEGER, start INTEGER, length INTEGER,"
            " PRIMARY KEY (line, number)) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Close the file and its table."""
        self._file.close()
        self._table.close()

    def refresh(self) -> None:
        """Read the complete lines that any process has added since."""
        with self._mutex, self._reading(), held(self._file.fileno(), self.path):
            self._refresh()

    def warn_of_spoilt(self) -> None:
        """Log a warning if there are damaged lines."""
        if self.spoilt:
            logger.warning(
                "%s: %d damaged lines are left out, the last of them %s; their pictures are drawn again",
                self.path,
                self.spoilt,
                quoted(self._last_spoilt),
            )

    def find(self, index: int, number: int) -> dict[str, Any] | None:
        """The newest line of a picture among those read, or None."""
        with self._mutex:
            row = self._table.execute(
                "SELECT length, start FROM finished WHERE line = ? AND number = ?", (index, number)
            ).fetchone()
            with self._reading():
                return None if row is None else json.loads(system.read_at(self._file.fileno(), *row))

    @property
    def size(self) -> int:
        """Bytes of the complete lines read."""
        return self._read

    def count(self, before: int | None = None) -> int:
        """Number of finished pictures read. before: count only lines that begin before that byte."""
        end = self._read if before is None else before
        with self._mutex:
            row = self._table.execute("SELECT COUNT(*) FROM finished WHERE start < ?", (end,)).fetchone()
        return int(row[0])

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append a line in one piece. Raises StorageError when it cannot be written or the file was removed."""
        line = json_text(entry).encode() + b"\n"
        try:
            self._check_exists()
            with self._mutex, held(self._file.fileno(), self.path):
                self._refresh()  # also finds the incomplete line of a killed process, which is cut off here
                self._file.truncate(self._read)
                self._write_whole(line)
        except OSError as error:
            raise self._unwritable(error) from None

    def _write_whole(self, line: bytes) -> None:
        """Write a line. On a full disk the system writes a part and reports the error only at the next attempt."""
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(self._read)
            raise

    def is_empty(self) -> bool:
        """Whether the file exists and has no line."""
        return self.path.exists() and self.path.stat().st_size == 0

    def tidy(self, temporary: Path) -> None:
        """Sort the lines by index, and drop those that newer ones replace. Only when no other process writes.

        temporary: path of the new file until it is complete.
        """
        self.refresh()
        if self._tidy:
            return
        try:
            with temporary.open("wb") as file:
                file.writelines(self._lines())
            self._file.close()  # Windows cannot replace an open file
            system.replace(temporary, self.path)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        self._table.execute("DELETE FROM finished")
        self._read, self._tidy, self._last = 0, True, (-1, -1)
        self.refresh()

    def entries(self) -> Iterator[dict[str, Any]]:
        """All lines, by index and number. Raises StorageError while they are read."""
        with self._reading():
            for line in self._lines():
                yield json.loads(line)

    def _lines(self) -> Iterator[bytes]:
        # A separate cursor: entries may be appended while these are read.
        rows = self._table.execute("SELECT start, length FROM finished ORDER BY line, number")
        return (system.read_at(self._file.fileno(), length, start) for start, length in rows)

    def _refresh(self) -> None:
        rest = b""
        start = self._read
        while chunk := system.read_at(self._file.fileno(), _CHUNK, start + len(rest)):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._index(line, start)
                start += len(line) + 1
            self._read = start

    def _index(self, line: bytes, start: int) -> None:
        try:
            entry = read_line(line)
        except ValueError:
            self.spoilt += 1
            self._last_spoilt, self._tidy = line[: LONGEST + 1], False
            return
        key = (entry["index"], entry["number"])
        self._tidy = self._tidy and key > self._last
        self._last = key
        self._table.execute("INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?)", (*key, start, len(line) + 1))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _check_exists(self) -> None:
        """Raises FileNotFoundError if the file was removed or replaced: writing to it would succeed and be lost."""
        if not system.is_same_file(self._file.fileno(), self.path):
            raise FileNotFoundError(2, "it was replaced while the run wrote to it")

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path.parent}: cannot be written: {error.strerror or error}; fix that and start again, or name"
            " another folder with --out"
        )


class _Size(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    height: int
    width: int


_Whole = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Line(BaseModel):
    """The entries of a line that are read; it may hold more."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    index: _Whole
    number: _Whole
    num_images: _Whole
    id: str
    prompt: str
    seed: _Whole
    run_seed: _Whole | None = None
    negative_prompt: str = ""
    model: str = ""
    license: str = ""
    cascade: str = ""
    file: Annotated[str, Field(min_length=1)]
    sha256: str
    stages: dict[str, str] = {}
    stages_sha256: dict[str, str] = {}
    seconds: float | None = None
    settings: _Size


def read_line(line: bytes) -> dict[str, Any]:
    """A line of a manifest. Raises ValueError for anything else."""
    entry: dict[str, Any] = parse_json(line)
    _Line.model_validate(entry)
    try:
        made_by(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"lacks {error}") from None
    if "\0" in "".join((entry["file"], *entry.get("stages", {}).values())):
        raise ValueError("a file name with a zero byte")
    return entry


def made_by(entry: Mapping[str, Any]) -> tuple[str, int]:
    """(digest of the recipe, pictures per prompt): the values that tell a picture from another one with its number.

    Raises KeyError or TypeError for an entry that is not a line of a manifest.
    """
    return Recipe.digest_of(entry), entry["num_images"]
