"""The user's Parquet files: any defect is reported on one line that names file, column and row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade.errors import CascadeError

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
