"""Where prompts come from: a file by its ending, a folder of captions, standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

from cascade.errors import CascadeError
from cascade.files.text import NoFileError, NotTextError, lines_of, open_regular, read_text
from cascade.files.walk import is_hidden
from cascade.prompts.disk import in_order
from cascade.prompts.formats import (
    Lines,
    Row,
    Values,
    csv_rows,
    json_rows,
    numbered_lines,
    parquet_rows,
    text_rows,
)
from cascade.prompts.record import BadLineError

STANDARD_INPUT = "-"
_CAPTIONS = (".txt", ".caption")

PlacedRow: TypeAlias = tuple[str, Values]
"""(where it stands, to be appended to the name of the source; values or fault)."""


def rows_of(source: str) -> Iterator[PlacedRow]:
    """The rows of a source, as they are needed. Raises CascadeError when it cannot be read, or its header is wrong."""
    if source != STANDARD_INPUT and Path(source).is_dir():
        yield from _caption_rows(Path(source))
        return
    for line, row in _numbered_rows(source):
        yield f":{line}", row


def count_prompts(source: str) -> int | None:
    """About how many prompts a source has, bad lines counted, for the time left; None when that is not known."""
    path = Path(source)
    if source == STANDARD_INPUT or not path.exists():
        return None
    if path.is_dir():
        return sum(1 for _ in _captions(path))
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    with _open(source) as file:
        return sum(bool(line.strip()) for line in lines_of(file)) - (path.suffix.lower() == ".csv")


def _numbered_rows(source: str) -> Iterator[Row]:
    if source == STANDARD_INPUT:
        with _readable("standard input"):
            yield from text_rows(numbered_lines(sys.stdin.buffer))
        return
    ending = Path(source).suffix.lower()
    of_lines: dict[str, Callable[[Lines], Iterator[Row]]] = {
        ".txt": text_rows,
        ".jsonl": json_rows,
        ".csv": partial(csv_rows, name=source),
    }
    if ending not in (*of_lines, ".parquet"):
        raise CascadeError(
            f"{source}: unknown kind of prompt file; expected one of {', '.join(of_lines)}, .parquet, a folder of .txt,"
            " or `-`"
        )
    with _open(source) as file:
        if ending == ".parquet":
            yield from parquet_rows(file, source)
        else:
            yield from of_lines[ending](numbered_lines(file))


def _caption_rows(folder: Path) -> Iterator[PlacedRow]:
    """Each .txt or .caption file is one prompt, in the order of the names; its id is the name without that."""
    with _readable(str(folder)):
        for name in in_order(_captions(folder)):
            yield f"/{name}", _caption(folder / name)


def _caption(path: Path) -> Values:
    try:
        text = read_text(path)
    except OSError as error:
        return BadLineError(f"cannot be read: {error.strerror or error}")
    except NotTextError as error:
        return BadLineError(str(error))
    return {"prompt": text.strip(), "id": path.stem}


def _captions(folder: Path) -> Iterator[str]:
    """Names of the captions, in no order. Hidden files, such as the `._a.txt` of a Mac, are none."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries)
        yield from (name for name in names if name.lower().endswith(_CAPTIONS) and not is_hidden(name))


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with _readable(path):
        try:
            file = open_regular(path)
        except NoFileError as error:
            raise CascadeError(f"{path}: cannot be read: {error.strerror}; pipe into `-`, for standard input") from None
        with file:
            yield file


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CascadeError(f"{path}: no such file") from None
    except OSError as error:
        raise CascadeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except NotTextError as error:
        raise CascadeError(f"{path}: {error}") from None
