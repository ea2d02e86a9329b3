"""Records: a picture, still encoded, and its captions; from folders, Parquet, `datasets` and scenes.

Three ideas, one class each for every kind of data:
- *records* (`FolderRecords`, `TableRecords`) are finite and answer to an index;
- a *source* says which record its k-th use is, as a pure function of k: `ShuffledSource` permutes records
  anew in each epoch, `StreamSource` does so within blocks of a stream, `SceneSource` draws;
- `open_source` makes the one that a section of the settings asks for.
"""

from __future__ import annotations

import bisect
import csv
import glob
import io
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from cascade.config import FolderSource, HubSource, ParquetSource, ScenesSource, SourceConfig
from cascade.data import scenes
from cascade.errors import CascadeError
from cascade.seeds import derive_seed, generator

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

EncodedPicture = bytes | Path | Image.Image | None
Row = dict[str, Any]
Key = tuple[int | str, ...]
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Record:
    """A picture as it is stored (None: there is none), its caption variants, and a name for messages."""

    image: EncodedPicture
    captions: tuple[str, ...]
    origin: str


class BadRecordError(Exception):
    """A record that gives no view: a broken picture, or no caption. Counted and passed over."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(f"{origin}: {reason}")


class Records(Protocol):
    """A finite collection."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecordError when its captions cannot be read."""

    def captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of every record that has readable ones, without touching pictures."""


class Source(Protocol):
    """Records in an order of its own."""

    def record(self, use: int, attempt: int = 0) -> Record:
        """The record of the `use`-th view of this source; `attempt` > 0: another in place of a bad one.

        Raises BadRecordError when its captions cannot be read.
        """


def open_source(config: SourceConfig, resolution: int, key: Key) -> Source:
    """The source that `config` describes, its order keyed by `key`; `resolution`: of drawn scenes."""
    if isinstance(config, ScenesSource):
        return SceneSource(config.held_out, resolution, key)
    if isinstance(config, HubSource) and config.streaming:
        return StreamSource(_open_stream(config), config.shuffle_buffer, config.name, key)
    return ShuffledSource(open_records(config), key)


def open_records(config: FolderSource | ParquetSource | HubSource) -> Records:
    """The records of a finite source."""
    if isinstance(config, FolderSource):
        return FolderRecords(Path(config.path), config.caption_column)
    return _open_parquet(config) if isinstance(config, ParquetSource) else _open_hub_table(config)


# --- sources ---------------------------------------------------------------------------------------------


class ShuffledSource:
    """Finite records: every epoch uses each once, in an order keyed by (key, epoch)."""

    def __init__(self, records: Records, key: Key) -> None:
        self._records = records
        self._key = key
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def record(self, use: int, attempt: int = 0) -> Record:
        count = len(self._records)
        if attempt:
            return self._records[_any_index(count, (*self._key, use, attempt))]
        epoch, position = divmod(use, count)
        if epoch != self._epoch:
            self._order = torch.randperm(count, generator=generator(*self._key, "epoch", epoch))
            self._epoch = epoch
        return self._records[int(self._order[position])]


class StreamSource:
    """A stream: blocks of `block_size` consecutive records, each permuted by an order keyed by (key, epoch).

    The library's own shuffle buffer is not restored at resume; this order is a function of `use` alone, and
    going on in the middle is `open_stream(skip)`. The stream's order itself is kept, so mixing reaches no
    further than a block. One block of encoded pictures is in memory. How long the stream is shows at its end;
    a run that resumes in a later epoch reads through it once to know.
    """

    def __init__(self, open_stream: Callable[[int], Iterable[Record]], block_size: int, name: str, key: Key) -> None:
        self._open_stream = open_stream
        self._block_size = block_size
        self._name = name
        self._key = key
        self._length: int | None = None
        self._start = -1
        self._block: list[Record] = []
        self._rest: Iterator[Record] | None = None

    def record(self, use: int, attempt: int = 0) -> Record:
        epoch, position = self._locate(use)
        count = len(self._block)
        if attempt:
            # Another of the same block, because reaching any other would mean reading the stream again.
            return self._block[_any_index(count, (*self._key, use, attempt))]
        order = torch.randperm(count, generator=generator(*self._key, "block", epoch, self._start))
        return self._block[int(order[position - self._start])]

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process starts with nothing read: iterators cannot travel."""
        return {**self.__dict__, "_rest": None, "_start": -1, "_block": []}

    def _locate(self, use: int) -> tuple[int, int]:
        """(epoch, position in it) of a use, with the block of that position loaded."""
        epoch, position = (0, use) if self._length is None else divmod(use, self._length)
        self._load(position // self._block_size * self._block_size)
        if position < self._start + len(self._block):
            return epoch, position
        if self._length is not None:
            raise CascadeError(f"data source {self._name}: the stream ended after fewer records than the first time")
        # The stream ended before `use`: now its length can be known.
        self._length = self._start + len(self._block) if self._block else self._count()
        if self._length == 0:
            raise CascadeError(f"data source {self._name}: the stream has no records")
        return self._locate(use)

    def _load(self, start: int) -> None:
        """Make the block at `start` the current one, reading on where the stream stands if possible."""
        if start == self._start:
            return
        reached = self._start + len(self._block)
        if self._rest is None or start < reached:
            self._rest = iter(self._open_stream(start))
            reached = start
        # Blocks that only other workers need are read past.
        ahead = itertools.islice(self._rest, start - reached, start - reached + self._block_size)
        self._block = list(ahead)
        self._start = start

    def _count(self) -> int:
        return sum(1 for _ in self._open_stream(0))


class SceneSource:
    """Drawn scenes, never the same twice."""

    def __init__(self, held_out: bool, resolution: int, key: Key) -> None:
        self._held_out = held_out
        self._resolution = resolution
        self._key = key

    def record(self, use: int, attempt: int = 0) -> Record:
        rng = random.Random(derive_seed(*self._key, "scene", use, attempt))
        scene = scenes.random_scene(rng, self._held_out)
        caption = scenes.describe(scene, rng)
        return Record(scenes.draw(scene, self._resolution), (caption,), f"scene {use}")


def _any_index(count: int, key: Key) -> int:
    return random.Random(derive_seed(*key)).randrange(count)


# --- a folder --------------------------------------------------------------------------------------------


class FolderRecords:
    """Pictures of a folder and its subfolders, sorted by path.

    Captions come from a metadata.jsonl or metadata.csv with `file_name` (relative to it) where one lists the
    picture, else from the .txt file of the same name, in which each line that is not empty is a variant.
    """

    def __init__(self, folder: Path, caption_column: str) -> None:
        if not folder.is_dir():
            raise CascadeError(f"data source {folder}: no such folder")
        self._listed: dict[Path, tuple[str, ...]] = {}
        for name in METADATA_NAMES:
            for path in sorted(folder.rglob(name)):
                self._listed.update(_read_metadata(path, caption_column))
        files = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        pictures = {path for path in files if not path.is_dir()}
        self._paths = sorted(pictures | self._listed.keys())
        if not self._paths:
            raise CascadeError(f"data source {folder}: no pictures; looked for {', '.join(sorted(PICTURE_SUFFIXES))}")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        return Record(path, self._captions_of(path), str(path))

    def captions(self) -> Iterator[tuple[str, ...]]:
        for path in self._paths:
            with suppress(BadRecordError):
                yield self._captions_of(path)

    def _captions_of(self, path: Path) -> tuple[str, ...]:
        if path in self._listed:
            return self._listed[path]
        for sidecar in (path.with_suffix(".txt"), path.with_suffix(".TXT")):
            try:
                return caption_variants(sidecar.read_text(encoding="utf-8-sig").splitlines())
            except FileNotFoundError:
                continue
            except UnicodeDecodeError:
                raise BadRecordError(str(sidecar), "not UTF-8") from None
            except OSError as error:
                raise BadRecordError(str(sidecar), f"cannot be read: {error.strerror}") from None
        return ()


def _read_metadata(path: Path, caption_column: str) -> dict[Path, tuple[str, ...]]:
    """Captions by picture path. Raises CascadeError for lines and columns that are not as they should be."""
    rows = list(_metadata_rows(path))
    columns = sorted({column for row in rows for column in row})
    for column in ("file_name", caption_column):
        if rows and column not in columns:
            raise CascadeError(f"{path}: no column {column!r}; there are {', '.join(columns)}")
    return {
        path.parent / str(row["file_name"]): caption_variants(row.get(caption_column))
        for row in rows
        if row.get("file_name")
    }


def _metadata_rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CascadeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".csv":
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), restkey="")
        except csv.Error as error:
            raise CascadeError(f"{path}: not valid CSV: {error}") from None
        return
    # Not `splitlines`, which also cuts at the rarer line ends that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CascadeError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise CascadeError(f'{path}, line {number}: expected an object such as {{"file_name": "a.png"}}')
        yield row


def caption_variants(value: object) -> tuple[str, ...]:
    """The non-empty strings in a caption or list of captions, stripped; anything else is no caption."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())


# --- tables and streams of Hugging Face `datasets` --------------------------------------------------------


class TableRecords:
    """Rows of a map-style `datasets.Dataset`, memory-mapped, pictures left encoded."""

    def __init__(self, table: Any, columns: tuple[str, str], name_row: Callable[[int], str]) -> None:
        self._image_column, self._caption_column = columns
        self._table = table
        self._name_row = name_row

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        row = self._table[index]
        return Record(
            encoded_picture(row[self._image_column]),
            caption_variants(row[self._caption_column]),
            self._name_row(index),
        )

    def captions(self) -> Iterator[tuple[str, ...]]:
        for batch in self._table.select_columns([self._caption_column]).iter(batch_size=1000):
            yield from map(caption_variants, batch[self._caption_column])


def encoded_picture(value: object) -> EncodedPicture:
    """What `datasets` or Parquet give for a picture -> bytes, a path or a PIL picture; None for all else."""
    if isinstance(value, dict):
        # `datasets` stores a struct: the bytes, or where there are none the path.
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value if isinstance(value, (bytes, Path, Image.Image)) else None


def _open_parquet(config: ParquetSource) -> TableRecords:
    import datasets
    import pyarrow.parquet as pq

    files = [path for pattern in config.files for path in _matching_files(pattern)]
    columns = (config.image_column, config.caption_column)
    starts, total = [], 0
    for path in files:
        try:
            parquet = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise CascadeError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
        with parquet:
            _require_columns(path, parquet.schema_arrow.names, columns)
            starts.append(total)
            total += parquet.metadata.num_rows

    if total == 0:
        raise CascadeError(f"data source {' '.join(config.files)}: there are no rows")
    table = _quietly(
        lambda: datasets.load_dataset("parquet", data_files=files, split="train", columns=list(columns)),
        " ".join(config.files),
    )
    return TableRecords(_undecoded(table, config.image_column), columns, partial(_file_row, files, starts))


def _file_row(files: list[str], starts: list[int], index: int) -> str:
    """The name of row `index` of all files together; `starts`: of the first row of each."""
    number = bisect.bisect_right(starts, index) - 1
    return f"{files[number]}, row {index - starts[number]}"


def _matching_files(pattern: str) -> list[str]:
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
    matches = sorted(path for path in found if Path(path).is_file())
    if not matches:
        hint = "; it is a folder: give folder/*.parquet" if Path(pattern).is_dir() else ""
        raise CascadeError(f"data source {pattern}: no file matches{hint}")
    return matches


def _open_hub_table(config: HubSource) -> TableRecords:
    table = _load_hub(config)
    columns = (config.image_column, config.caption_column)
    _require_columns(config.name, table.column_names, columns)
    if not len(table):
        raise CascadeError(f"data source {config.name}: there are no rows")
    table = _undecoded(table.select_columns(list(columns)), config.image_column)
    return TableRecords(table, columns, partial(_hub_row, config.name))


def _hub_row(name: str, index: int) -> str:
    return f"{name}, row {index}"


def _open_stream(config: HubSource) -> Callable[[int], Iterator[Record]]:
    """A function from a number of records to skip to the records after them."""
    stream = _load_hub(config)
    columns = (config.image_column, config.caption_column)
    if stream.column_names is not None:
        _require_columns(config.name, stream.column_names, columns)
    return partial(_stream_records, _undecoded(stream, config.image_column), config)


def _stream_records(stream: Any, config: HubSource, skip: int) -> Iterator[Record]:
    number = skip
    for batch in _stream_batches(stream, config.name, skip):
        # Only now are the columns of every kind of stream known.
        _require_columns(config.name, list(batch), (config.image_column, config.caption_column))
        for image, captions in zip(batch[config.image_column], batch[config.caption_column], strict=True):
            yield Record(encoded_picture(image), caption_variants(captions), _hub_row(config.name, number))
            number += 1


def _stream_batches(stream: Any, name: str, skip: int) -> Iterator[dict[str, Any]]:
    """Batches of rows, and whatever breaks while the library reads them as CascadeError."""
    try:
        # `iter` and not a plain loop, which in a worker process would see only the worker's part of the stream.
        yield from stream.skip(skip).iter(batch_size=_ROWS_AT_ONCE)
    except Exception as error:  # files, networks and builders raise nearly everything
        raise CascadeError(f"data source {name}: the stream broke off: {_first_line(error)}") from error


def _load_hub(config: HubSource) -> Any:
    import datasets

    return _quietly(
        lambda: datasets.load_dataset(config.name, config.config, split=config.split, streaming=config.streaming),
        config.name,
    )


def _quietly(load: Callable[[], Any], name: str) -> Any:
    """`load()` without progress bars, its many kinds of failure as CascadeError."""
    import datasets

    silenced = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # the library, its file systems and its builders raise nearly everything
        raise CascadeError(f"data source {name}: cannot be loaded: {_first_line(error)}") from error
    finally:
        if not silenced:
            datasets.enable_progress_bars()


def _undecoded(table: Any, image_column: str) -> Any:
    """Pictures as bytes, so that broken ones can be counted instead of stopping the reader."""
    import datasets

    features = table.features
    if features is not None and isinstance(features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def _require_columns(name: str, present: Iterable[str], wanted: Iterable[str]) -> None:
    present = list(present)
    for column in wanted:
        if column not in present:
            raise CascadeError(f"data source {name}: no column {column!r}; there are {', '.join(present)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
