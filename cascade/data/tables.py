"""Records of Parquet files and of Hugging Face `datasets`, as tables and as streams."""

from __future__ import annotations

import bisect
import errno
import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cascade.config.data import HubSource, ParquetSource
from cascade.data.records import ALL, BadRecordError, Record, Wanted, caption_variants, encoded_picture
from cascade.errors import CascadeError, quoted

_ROWS_AT_ONCE = 16
_UNREADABLE = (OSError, ValueError, OverflowError, LookupError, TypeError, NotImplementedError)
"""Errors of pyarrow, whose own exceptions derive from these, for a cell that has no value in Python."""


class TableRecords:
    """Rows of a map-style `datasets.Dataset`, memory-mapped, with encoded pictures."""

    def __init__(
        self,
        table: Any,
        columns: tuple[str, str],
        name_row: Callable[[int], str],
        low_column: str | None = None,
        wanted: Wanted = ALL,
        mask_column: str | None = None,
    ) -> None:
        self._image_column, self._caption_column = columns
        self._wanted = wanted
        self._low_column, self._mask_column = low_column, mask_column
        self._table = table
        self._name_row = name_row

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """The library's fingerprint, which changes when the rows do."""
        return str(self._table._fingerprint)

    def __getitem__(self, index: int) -> Record:
        try:
            row = self._table[index]
        except _UNREADABLE as error:  # a date beyond those of Python
            raise BadRecordError(self._name_row(index), f"cannot be read: {_first_line(error)}") from None
        return Record(
            encoded_picture(row[self._image_column]),
            caption_variants(row.get(self._caption_column)),
            self._name_row(index),
            None if self._low_column is None else encoded_picture(row[self._low_column]),
            values=condition_values(row, self._wanted),
            mask=None if self._mask_column is None else encoded_picture(row[self._mask_column]),
        )

    def captions(self) -> Iterator[tuple[str, ...]]:
        if self._caption_column not in self._table.column_names:
            return
        try:
            for batch in self._table.select_columns([self._caption_column]).iter(batch_size=1000):
                yield from map(caption_variants, batch[self._caption_column])
        except _UNREADABLE as error:
            first = self._name_row(0)
            raise CascadeError(f"{first}: column {quoted(self._caption_column)}: {_first_line(error)}") from None


def condition_values(row: dict[str, Any], wanted: Wanted) -> dict[str, object]:
    """The values of conditions in a row, encoded pictures in place of the structs that hold them."""
    return {
        name: encoded_picture(value) if isinstance(value, dict) else value for name, value in wanted.values(row).items()
    }


def open_parquet(config: ParquetSource, files: list[str], wanted: Wanted = ALL) -> TableRecords:
    """The rows of Parquet `files`. Raises CascadeError for a file that is not Parquet, or lacks a column."""
    import datasets
    import pyarrow.parquet as pq

    columns = (config.image_column, config.caption_column)
    pictures = [name for name in (config.image_column, config.low_column, config.mask_column) if name is not None]
    needed = list(dict.fromkeys([*pictures, *([config.caption_column] * wanted.captions), *wanted.columns.values()]))
    starts, total, captioned = [], 0, True
    for path in files:
        try:
            parquet = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise CascadeError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
        with parquet:
            present = parquet.schema_arrow.names
            _require_columns(path, present, needed)
            captioned = captioned and config.caption_column in present
            starts.append(total)
            total += parquet.metadata.num_rows
    read = list(dict.fromkeys([*needed, *([config.caption_column] * captioned)]))

    if total == 0:
        raise CascadeError(f"data source {' '.join(config.files)}: no rows")
    try:
        table = _quietly(
            # The library treats each name as a pattern.
            lambda: datasets.load_dataset(
                "parquet", data_files=[*map(glob.escape, files)], split="train", columns=read
            ),
            " ".join(config.files),
        )
    except CascadeError as error:
        raise _of_types(files, read) or error from None
    for column in (*pictures, *wanted.columns.values()):
        table = _undecoded(table, column)
    return TableRecords(
        table, columns, partial(_file_row, files, starts), config.low_column, wanted, config.mask_column
    )


def _of_types(files: Sequence[str], columns: Sequence[str]) -> CascadeError | None:
    """An error that names the file whose column differs in type from the first file's; the library names neither."""
    import pyarrow.parquet as pq

    types = [{name: str(pq.read_schema(path).field(name).type) for name in columns} for path in files]
    for path, own in zip(files, types, strict=True):
        for name in columns:
            if own[name] != types[0][name]:
                return CascadeError(
                    f"{path}: column {quoted(name)} is {own[name]}, in {files[0]} {types[0][name]}; make them equal,"
                    " or list the files in two sources"
                )
    return None


def _file_row(files: list[str], starts: list[int], index: int) -> str:
    """The name of row `index` in all files together; `starts`: index of each file's first row."""
    number = bisect.bisect_right(starts, index) - 1
    return f"{files[number]}, row {index - starts[number]}"


def open_hub_table(config: HubSource, wanted: Wanted = ALL) -> TableRecords:
    """The rows of a dataset, on disk. Raises CascadeError when it cannot be loaded, is empty or lacks a column."""
    table = _load_hub(config)
    columns = (config.image_column, config.caption_column)
    _require_columns(config.name, table.column_names, _needed(config, wanted))
    if not len(table):
        raise CascadeError(f"data source {config.name}: no rows")
    read = dict.fromkeys((*columns, *wanted.columns.values()))
    table = table.select_columns([column for column in read if column in table.column_names])
    for column in (config.image_column, *wanted.columns.values()):
        table = _undecoded(table, column)
    return TableRecords(table, columns, partial(_hub_row, config.name), wanted=wanted)


def _needed(config: HubSource, wanted: Wanted) -> list[str]:
    """The columns that every row must have."""
    captions = [config.caption_column] if wanted.captions else []
    return [config.image_column, *captions, *wanted.columns.values()]


def _hub_row(name: str, index: int) -> str:
    return f"{name}, row {index}"


def open_stream(config: HubSource, wanted: Wanted = ALL) -> Callable[[int], Iterator[Record]]:
    """A function from a number of records to skip to the records after them."""
    stream = _load_hub(config)
    if stream.column_names is not None:
        _require_columns(config.name, stream.column_names, _needed(config, wanted))
    for column in (config.image_column, *wanted.columns.values()):
        stream = _undecoded(stream, column)
    return partial(_stream_records, stream, config, wanted)


def _stream_records(stream: Any, config: HubSource, wanted: Wanted, skip: int) -> Iterator[Record]:
    number = skip
    for batch in _stream_batches(stream, config.name, skip):
        # Some streams list their columns only with the first batch.
        _require_columns(config.name, list(batch), _needed(config, wanted))
        for index, image in enumerate(batch[config.image_column]):
            row = {column: values[index] for column, values in batch.items()}
            captions = caption_variants(row.get(config.caption_column))
            origin = _hub_row(config.name, number)
            yield Record(encoded_picture(image), captions, origin, values=condition_values(row, wanted))
            number += 1


def _stream_batches(stream: Any, name: str, skip: int) -> Iterator[dict[str, Any]]:
    """Batches of rows; any error of the library becomes a CascadeError."""
    try:
        # `iter`, because a plain loop in a worker process would read only the worker's part of the stream.
        yield from stream.skip(skip).iter(batch_size=_ROWS_AT_ONCE)
    except Exception as error:  # files, networks and builders raise exceptions of many types
        raise CascadeError(f"data source {name}: the stream broke off: {_first_line(error)}") from error


def _load_hub(config: HubSource) -> Any:
    import datasets

    _check_name(Path(config.name))
    return _quietly(
        lambda: datasets.load_dataset(config.name, config.config, split=config.split, streaming=config.streaming),
        config.name,
    )


def _check_name(folder: Path) -> None:
    """Raise CascadeError for a folder whose name the library would treat as a pattern and so read others instead.

    The library resolves links first, so a link with a plain name does not help.
    """
    whole = str(folder.resolve()) if folder.is_dir() else ""
    if glob.has_magic(whole) or "::" in whole:
        raise CascadeError(
            f"data source {folder}: `datasets` treats `*`, `?`, `[` and `::` in {whole} as a pattern; rename the"
            " folder, or read it with kind: parquet, webdataset or folder"
        )


def _quietly(load: Callable[[], Any], name: str) -> Any:
    """`load()` without progress bars; any failure becomes a CascadeError."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # the library, its file systems and builders raise exceptions of many types
        hint = ""
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            hint = f"; its cache is {datasets.config.HF_DATASETS_CACHE}: HF_DATASETS_CACHE names another folder"
        raise CascadeError(f"data source {name}: cannot be loaded: {_first_line(error)}{hint}") from error
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def _undecoded(table: Any, image_column: str) -> Any:
    """The table with pictures as bytes, so that broken ones are counted instead of stopping the reader."""
    import datasets

    features = table.features
    if features is not None and isinstance(features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def _require_columns(name: str, present: Iterable[str], wanted: Iterable[str]) -> None:
    present = list(present)
    for column in wanted:
        if column not in present:
            raise CascadeError(f"data source {name}: no column {quoted(column)}; the columns are {', '.join(present)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
