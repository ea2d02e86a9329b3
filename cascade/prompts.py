"""Prompts as streams of records: .txt, .jsonl, .csv, Parquet, folders of captions, standard input.

A bad line is named, the others go on. Memory does not grow with the number of lines.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from cascade.errors import CascadeError
from cascade.sampling import number, per_stage, whole_number
from cascade.seeds import MAX_SEED, derive_seed
from cascade.text.captions import well_formed

STANDARD_INPUT = "-"
_MOST = 1_000_000  # steps, or pictures of one prompt
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the error handler `surrogateescape` makes of other bytes


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw, and what its line says of it; None: as the call says.

    index: its place among the prompts of the file, bad lines counted, so that mending one moves no other.
    origin: `file:line`, for messages.
    """

    index: int
    prompt: str
    seed: int
    origin: str = "command line"
    id: str | None = None
    negative_prompt: str | None = None
    num_images: int | None = None
    guidance: float | dict[str, float] | None = None
    steps: int | dict[str, int] | None = None


@dataclass(frozen=True)
class Failure:
    """A line of a prompt file, or a picture of one, that cannot be drawn, and why. index: the line's place."""

    origin: str
    reason: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class BadLineError(ValueError):
    """What is wrong with one line."""


def given_prompts(prompts: Iterable[str], seed: int) -> Iterator[PromptRecord]:
    """Prompts of the command line; the seed holds for each."""
    return (PromptRecord(index, well_formed(prompt), seed) for index, prompt in enumerate(prompts))


def read_prompts(source: str, run_seed: int) -> Iterator[PromptRecord | Failure]:
    """The prompts of a file, a folder of .txt captions, or standard input (`-`, a prompt a line), as they are needed.

    A line without a seed gets one from (run seed, its id), or without an id from its text and how often that text
    occurred before. Raises CascadeError, at once, when the file is missing, empty, of no known kind, or its header
    is wrong.
    """
    name = "standard input" if source == STANDARD_INPUT else source
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise CascadeError(f"{name}: no prompts in it; write one a line")
    return _records(chain([first], rows), name, run_seed)


Lines = Iterable[tuple[int, str]]
"""Numbered lines."""

Row = tuple[int, "Mapping[str, Any] | BadLineError"]
"""(line number, the values by column, or what is wrong with the line)."""

PlacedRow = tuple[str, "Mapping[str, Any] | BadLineError"]
"""(where it stands, to be appended to the name of the source; values or fault)."""


def _rows(source: str) -> Iterator[PlacedRow]:
    if source != STANDARD_INPUT and Path(source).is_dir():
        yield from _caption_rows(Path(source))
        return
    for line, row in _numbered_rows(source):
        yield f":{line}", row


def _numbered_rows(source: str) -> Iterator[Row]:
    if source == STANDARD_INPUT:
        yield from _text_rows(_lines(sys.stdin.buffer))
        return
    if Path(source).suffix.lower() == ".parquet":
        yield from _parquet_rows(source)
        return
    kinds: dict[str, Callable[[Lines], Iterator[Row]]] = {
        ".txt": _text_rows,
        ".jsonl": _json_rows,
        ".csv": partial(_csv_rows, name=source),
    }
    kind = kinds.get(Path(source).suffix.lower())
    if kind is None:
        raise CascadeError(
            f"{source}: unknown kind of prompt file; expected one of {', '.join(kinds)}, .parquet, a folder of .txt,"
            " or `-`"
        )
    with _open(source) as file:
        yield from kind(_lines(file))


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with _readable(path), Path(path).open("rb") as file:
        yield file


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; bytes that are not UTF-8 become lone surrogates."""
    for line, raw in enumerate(file, start=1):
        text = raw.decode("utf-8", "surrogateescape").rstrip("\r\n")
        yield line, text.removeprefix("\ufeff") if line == 1 else text


def _caption_rows(folder: Path) -> Iterator[PlacedRow]:
    """Each .txt file is one prompt, in the order of the names; its id is the name."""
    with _readable(str(folder)):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".txt"))
    for name in names:
        try:
            text = (folder / name).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
            yield f"/{name}", {"prompt": text, "id": name.removesuffix(".txt")}
        except OSError as error:
            yield f"/{name}", BadLineError(f"cannot be read: {error.strerror or error}")


def _parquet_rows(source: str) -> Iterator[Row]:
    """The rows of a Parquet file, read in small batches; a null counts as not given."""
    from pyarrow import ArrowException, parquet

    with _open(source) as file:
        try:
            table = parquet.ParquetFile(file)
            _check_header(table.schema_arrow.names, source)
            rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
            yield from enumerate((_without_nulls(row) for row in rows), start=1)
        except ArrowException as error:
            raise CascadeError(f"{source}: damaged, or not Parquet: {str(error).splitlines()[0]}") from None


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without nulls, in {stage: value} too: there Parquet writes every stage of any row."""
    values = {}
    for column, value in row.items():
        kept = {name: own for name, own in value.items() if own is not None} if isinstance(value, dict) else value
        if kept is not None and kept != {}:
            values[column] = kept
    return values


def _text_rows(lines: Lines) -> Iterator[Row]:
    for line, text in lines:
        if text.strip():
            yield line, {"prompt": text.strip()}


def _json_rows(lines: Lines) -> Iterator[Row]:
    for line, text in lines:
        if not text.strip():
            continue
        try:
            value = json.loads(_utf8(text))
        except BadLineError as error:
            yield line, error
        except json.JSONDecodeError as error:
            yield line, BadLineError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield line, BadLineError(f"not valid JSON: {error}")
        else:
            if isinstance(value, (str, dict)):
                yield line, {"prompt": value} if isinstance(value, str) else value
            else:
                yield line, BadLineError("expected a JSON string or object")


def _csv_rows(lines: Lines, name: str) -> Iterator[Row]:
    """Rows below a header that names the columns. An empty cell counts as not given."""
    current = 0

    def texts() -> Iterator[str]:
        nonlocal current
        for line, text in lines:
            current = line
            yield text + "\n"

    reader = csv.reader(texts())
    header = _header(reader)
    if header:
        _check_header(header, f"{name}:{current}")
    while header:
        first = current + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, BadLineError(f"not valid CSV: {error}")
            continue
        if any(cell.strip() for cell in cells):
            yield first, _csv_row(header, cells)


def _header(reader: Iterator[list[str]]) -> list[str]:
    """The first row that is not blank; empty when there is none, or it is no row."""
    try:
        rows = ([cell.strip() for cell in cells] for cells in reader)
        return next((cells for cells in rows if any(cells)), [])
    except csv.Error:
        return ["not valid CSV"]


def _check_header(header: Sequence[str], origin: str) -> None:
    """A wrong header spoils every line below it."""
    for column in header:
        if column not in _COLUMNS:
            raise CascadeError(f"{origin}: {_unknown(column)}")
    if "prompt" not in header or len(set(header)) != len(header):
        raise CascadeError(f"{origin}: expected a header with each column once, among them prompt")


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> Mapping[str, Any] | BadLineError:
    if len(cells) != len(header):
        return BadLineError(f"{len(cells)} cells, the header has {len(header)}")
    try:
        return {column: _csv_value(column, cell) for column, cell in zip(header, cells, strict=True) if cell.strip()}
    except ValueError as error:
        return BadLineError(str(error))


def _csv_value(column: str, cell: str) -> Any:
    """The value that a cell's text stands for."""
    try:
        match column:
            case "seed" | "num_images":
                return whole_number(cell)
            case "guidance":
                return per_stage(cell, number)
            case "steps":
                return per_stage(cell, whole_number)
    except ValueError as error:
        raise BadLineError(f"{column}: {error}") from None
    return cell.strip()


def _records(rows: Iterable[PlacedRow], name: str, run_seed: int) -> Iterator[PromptRecord | Failure]:
    with closing(_Counts()) as counts:
        for index, (place, row) in enumerate(rows):
            origin = name + place
            try:
                values = _checked(row)
                identifier, prompt = values.get("id"), values["prompt"]
                if identifier is not None and counts.add("id", identifier):
                    raise BadLineError(f"id: {identifier!r} stands on an earlier line; every id must be its own")
                earlier = counts.add("text", prompt)
                if "seed" not in values:
                    own = ("id", identifier) if identifier else ("text", prompt, earlier)
                    values["seed"] = derive_seed(run_seed, *own)
                yield PromptRecord(index, origin=origin, **values)
            except BadLineError as error:
                yield Failure(origin, str(error), index)


class _Counts:
    """How often each text was seen: in a temporary database of SQLite, which keeps to a few MB of memory."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # the empty name: on disk, gone when closed
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, kind: str, text: str) -> int:
        """How often `text` was added before."""
        key = hashlib.sha256(f"{kind} {text}".encode()).digest()[:16]
        row = self._database.execute(
            "INSERT INTO seen VALUES (?, 0) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times", (key,)
        ).fetchone()
        return int(row[0])

    def close(self) -> None:
        self._database.close()


def _checked(row: Mapping[str, Any] | BadLineError) -> dict[str, Any]:
    """The values of a line, of the right types; those not given are left out."""
    if isinstance(row, BadLineError):
        raise row
    values = {}
    for column, value in row.items():
        if column not in _COLUMNS:
            raise BadLineError(_unknown(column))
        if value is not None:
            values[column] = _COLUMNS[column](column, value)
    if not values.get("prompt"):
        raise BadLineError("prompt is missing")
    return values


def _unknown(column: str) -> str:
    close = difflib.get_close_matches(column, _COLUMNS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(_COLUMNS)}"
    return f"{well_formed(column)!r} is not a column; {hint}"


def _utf8(text: str) -> str:
    if _NOT_UTF8.search(text):
        raise BadLineError("not UTF-8; save the file as UTF-8")
    return text


def _shown(value: Any) -> str:
    text = "a number of many digits" if isinstance(value, int) and abs(value) > 10**40 else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadLineError(f"{column}: expected text, found {_shown(value)}")
    return well_formed(_utf8(value)).strip()


def _identifier(column: str, value: Any) -> str:
    """An id may be a number in JSON."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(column, value)
    if not text:
        raise BadLineError(f"{column}: is empty")
    return text


def _whole(column: str, value: Any, minimum: int, maximum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise BadLineError(f"{column}: expected a whole number in {minimum}..{maximum}, found {_shown(value)}")
    return value


def _weight(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise BadLineError(f"{column}: expected a number of at least 0, found {_shown(value)}")
    return float(value)


def _each_stage(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """`check` for one value, or for each of {stage: value}."""

    def checked(column: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {stage: check(f"{column}.{stage}", own) for stage, own in value.items()}
        return check(column, value)

    return checked


def _at_least_one(column: str, value: Any) -> int:
    return _whole(column, value, 1, _MOST)


_COLUMNS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "seed": lambda column, value: _whole(column, value, 0, MAX_SEED),
    "negative_prompt": _text,
    "id": _identifier,
    "num_images": _at_least_one,
    "guidance": _each_stage(_weight),
    "steps": _each_stage(_at_least_one),
}


def count_prompts(source: str) -> int | None:
    """About how many prompts a source has, bad lines counted, for the time left; None when that is not known."""
    path = Path(source)
    if source == STANDARD_INPUT or not path.exists():
        return None
    if path.is_dir():
        return sum(entry.name.endswith(".txt") for entry in os.scandir(path))
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file) - (path.suffix.lower() == ".csv")
