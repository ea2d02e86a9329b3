"""Formats of prompt files: conversion of numbered lines, or of a table, to rows of values by column."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

from cascade.errors import CascadeError
from cascade.files.parquet import parquet_errors
from cascade.files.parsed import parse_json
from cascade.files.table import BadRowError
from cascade.files.table import csv_rows as table_rows
from cascade.files.text import lines_of
from cascade.prompts.columns import check_header, from_text, utf8, without_nulls
from cascade.prompts.record import BadLineError

Lines: TypeAlias = Iterable[tuple[int, str]]
"""Line numbers and lines without their ends."""

Values: TypeAlias = "Mapping[str, Any] | BadLineError"
"""The values of a row by column, or the row's defect."""

Row: TypeAlias = tuple[int, Values]
"""(line number, values or defect)."""


def numbered_lines(file: BinaryIO) -> Lines:
    """Numbered lines without their ends; bytes that are not UTF-8 become lone surrogates. Raises NotTextError."""
    return enumerate(lines_of(file), start=1)


def text_rows(lines: Lines) -> Iterator[Row]:
    """One prompt per line."""
    for line, text in lines:
        if text.strip():
            yield line, {"prompt": text.strip()}


def json_rows(lines: Lines) -> Iterator[Row]:
    """One JSON string or object per line."""
    for line, text in lines:
        if not text.strip():
            continue
        try:
            value = parse_json(utf8(text))
        except BadLineError as error:
            yield line, error
        except json.JSONDecodeError as error:
            yield line, BadLineError(f"not valid JSON: {error.msg} at column {error.colno}")
        except ValueError as error:
            yield line, BadLineError(f"not valid JSON: {error}")
        else:
            if isinstance(value, (str, dict)):
                yield line, {"prompt": value} if isinstance(value, str) else value
            else:
                yield line, BadLineError("expected a JSON string or object")


def csv_rows(lines: Lines, name: str, separator: str | None = None, conditions: Collection[str] = ()) -> Iterator[Row]:
    """Rows below a header that names the columns. An empty cell counts as missing.

    separator: the separator of cells; None: commas, semicolons or tabs, as in the header.
    Raises CascadeError, which begins with `name`, when the header is wrong, and for a quote that is not closed.
    """
    rows = table_rows((text for _, text in lines), name, separator)
    line, header = next(rows, (0, list[str]()))
    if isinstance(header, BadRowError):
        raise CascadeError(f"{name}:{line}: {header}")
    header = [cell.strip() for cell in header]
    if header:
        check_header(header, f"{name}:{line}", conditions)
    for line, cells in rows:
        yield line, BadLineError(str(cells)) if isinstance(cells, BadRowError) else _csv_row(header, cells)


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> Values:
    if len(cells) != len(header):
        return BadLineError(f"{len(cells)} cells, the header has {len(header)}")
    try:
        return {column: from_text(column, cell) for column, cell in zip(header, cells, strict=True) if cell.strip()}
    except BadLineError as error:
        return error


def parquet_rows(file: BinaryIO, name: str, conditions: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a Parquet file, in small batches. Raises CascadeError for a damaged file or a wrong header."""
    from pyarrow import parquet

    with parquet_errors(name):
        table = parquet.ParquetFile(file)
        check_header(table.schema_arrow.names, name, conditions)
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from enumerate(map(without_nulls, rows), start=1)
