"""Sources and records built from a section of the settings, and the order in which records are used."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cascade.config.data import (
    DataConfig,
    FolderSource,
    HubSource,
    ParquetSource,
    ScenesSource,
    SourceConfig,
    WebDatasetSource,
)
from cascade.data import scenes
from cascade.data.decoded import Making, decoded, stamp_of_files
from cascade.data.folder import FolderRecords, files_of
from cascade.data.records import ALL, PICTURE_SUFFIXES, Record, Records, Wanted
from cascade.data.tables import open_hub_table, open_parquet, open_stream
from cascade.data.tars import TarRecords
from cascade.errors import CascadeError
from cascade.files.paths import matching
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.rasters import ARRAY_SUFFIXES
from cascade.seeds import derive_seed, generator

# --- order -----------------------------------------------------------------------------------------------------------
# The order in which records are used, as a pure function of the number of earlier uses.
#
# A *source* maps its k-th use to a record: `ShuffledSource` permutes finite records in each epoch, `ShardedSource`
# their shards and then blocks, `StreamSource` blocks of a stream, and `SceneSource` draws. A resumed run therefore
# needs only a number.

Key = tuple[int | str, ...]
CYCLE = 1000
"""Number of views in which every source has exactly its share."""


class Source(Protocol):
    """Records in the source's own order."""

    def record(self, use: int, attempt: int = 0) -> Record:
        """The record of the `use`-th view of this source; `attempt` > 0: a replacement for a bad record.

        Raises BadRecordError when its captions cannot be read.
        """


class ShuffledSource:
    """Finite records: every epoch uses each once, in an order keyed by (key, epoch)."""

    def __init__(self, records: Records, key: Key) -> None:
        self._records = records
        self._key = key
        self._epoch = -1
        self._order = np.empty(0, np.int64)  # of NumPy, whose single elements are read ten times as fast as torch's

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self._records)

    def record(self, use: int, attempt: int = 0) -> Record:
        count = len(self._records)
        if attempt:
            return self._records[_any_index(count, (*self._key, use, attempt))]
        epoch, position = divmod(use, count)
        if epoch != self._epoch:
            self._order = torch.randperm(count, generator=generator(*self._key, "epoch", epoch)).numpy()
            self._epoch = epoch
        return self._records[int(self._order[position])]


class ShardedSource:
    """Finite records in shards: every epoch uses each once, and consecutive reads are near each other.

    An epoch permutes the shards, then each block of `block_size` consecutive records of that sequence, in orders
    keyed by (key, epoch). This is faster on disks and their caches than random reads, and keeps nothing in memory.
    """

    def __init__(self, records: Records, starts: Sequence[int], block_size: int, key: Key) -> None:
        """starts: index of each shard's first record, then the number of all records."""
        self._records = records
        self._starts = torch.tensor(starts)
        self._block_size = block_size
        self._key = key
        self._epoch = -1
        self._shards = self._ends = torch.empty(0, dtype=torch.int64)
        self._place = (-1, -1)
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self._records)

    def record(self, use: int, attempt: int = 0) -> Record:
        count = len(self._records)
        if attempt:
            return self._records[_any_index(count, (*self._key, use, attempt))]
        epoch, position = divmod(use, count)
        start = position // self._block_size * self._block_size
        self._arrange(epoch, start, min(self._block_size, count - start))
        place = start + self._order[position - start]
        turn = int(torch.searchsorted(self._ends, place, right=True))  # position of the shard in the epoch's sequence
        shard = int(self._shards[turn])
        return self._records[int(self._starts[shard + 1] - (self._ends[turn] - place))]

    def _arrange(self, epoch: int, start: int, length: int) -> None:
        """Permute the shards of an epoch, and the block that begins at `start`, unless it is the current one."""
        if epoch != self._epoch:
            sizes = self._starts.diff()
            self._shards = torch.randperm(len(sizes), generator=generator(*self._key, "shards", epoch))
            self._ends = sizes[self._shards].cumsum(0)
            self._epoch = epoch
        if (epoch, start) != self._place:
            self._order = torch.randperm(length, generator=generator(*self._key, "block", epoch, start))
            self._place = (epoch, start)


class StreamSource:
    """A stream: blocks of `block_size` consecutive records, each permuted by an order keyed by (key, epoch).

    `datasets` does not restore its shuffle buffer on resume; this order is a function of `use` alone, and resuming
    calls `open_stream(skip)`. The order of blocks is the stream's, so records are mixed only within a block. One block
    of encoded pictures is in memory. The stream's length is known at its end; a run that resumes in a later epoch
    reads the stream once to determine it.
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
            # Another record of the same block, because any other would require reading the stream again.
            return self._block[_any_index(count, (*self._key, use, attempt))]
        order = torch.randperm(count, generator=generator(*self._key, "block", epoch, self._start))
        return self._block[int(order[position - self._start])]

    def __getstate__(self) -> dict[str, Any]:
        """The state without iterators, which cannot be pickled: a copy in another process starts with nothing read."""
        return {**self.__dict__, "_rest": None, "_start": -1, "_block": []}

    def _locate(self, use: int) -> tuple[int, int]:
        """(epoch, position in it) of a use; loads the block of that position."""
        epoch, position = (0, use) if self._length is None else divmod(use, self._length)
        self._load(position // self._block_size * self._block_size)
        if position < self._start + len(self._block):
            return epoch, position
        if self._length is not None:
            raise CascadeError(f"data source {self._name}: the stream ended earlier than in its first epoch")
        # The stream ended before `use`, so its length is now known.
        self._length = self._start + len(self._block) if self._block else self._count()
        if self._length == 0:
            raise CascadeError(f"data source {self._name}: the stream has no records")
        return self._locate(use)

    def _load(self, start: int) -> None:
        """Make the block at `start` the current one, continuing from the stream's position if possible."""
        if start == self._start:
            return
        reached = self._start + len(self._block)
        if self._rest is None or start < reached:
            self._rest = iter(self._open_stream(start))
            reached = start
        # Blocks that only other workers need are skipped.
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
        return Record(scenes.draw(scene, self._resolution), (caption,), f"scene {use}", drawn=True)


def _any_index(count: int, key: Key) -> int:
    return random.Random(derive_seed(*key)).randrange(count)


class Mixture:
    """The source of view n, and how many times that source was used before.

    Every cycle of views contains each source in proportion to its weight (at least once), shuffled by a generator
    keyed by (seed, cycle). The number of uses before n is therefore arithmetic, and known immediately on resume.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._counts = torch.tensor(_shares(weights, max(CYCLE, len(weights))))
        self._length = int(self._counts.sum())
        self._seed = seed
        self._cycle = -1
        self._places: list[tuple[int, int]] = []

    def locate(self, view: int) -> tuple[int, int]:
        """(index of the source, number of its earlier uses) of a view."""
        cycle, position = divmod(view, self._length)
        if cycle != self._cycle:
            ordered = torch.repeat_interleave(torch.arange(len(self._counts)), self._counts)
            order = torch.randperm(self._length, generator=generator(self._seed, "mixture", cycle))
            sources = ordered[order].tolist()
            uses = [cycle * count for count in self._counts.tolist()]
            self._places, self._cycle = [], cycle
            for source in sources:
                self._places.append((source, uses[source]))
                uses[source] += 1
        return self._places[position]


def _shares(weights: Sequence[float], length: int) -> list[int]:
    """Whole numbers, at least 1, that sum to about `length` in proportion to `weights`."""
    exact = [weight / sum(weights) * length for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: max(0, length - sum(counts))]:
        counts[index] += 1
    return counts


# --- sources ---------------------------------------------------------------------------------------------------------

FiniteSource = FolderSource | ParquetSource | WebDatasetSource | HubSource


def open_source(
    config: SourceConfig,
    resolution: int,
    key: Key,
    data: DataConfig | None = None,
    form: PictureFormat = RGB,
    wanted: Wanted = ALL,
) -> Source:
    """The source that `config` describes, with its order keyed by `key`; `resolution`: of drawn scenes.

    data: if its `decoded` is set, pictures of finite sources are read from that folder, at `resolution`. form: of the
    pictures; it decides which files of a folder are pictures.
    """
    if isinstance(config, ScenesSource):
        return SceneSource(config.held_out, resolution, key)
    if isinstance(config, HubSource) and config.streaming:
        return StreamSource(open_stream(config, wanted), config.shuffle_buffer, config.name, key)
    if isinstance(config, WebDatasetSource):
        tars = _open_tars(config, wanted)
        return ShardedSource(
            _perhaps_decoded(tars, config, data, resolution, form, wanted), tars.starts, config.shuffle_block, key
        )
    records = open_records(config, form, wanted)
    return ShuffledSource(_perhaps_decoded(records, config, data, resolution, form, wanted), key)


def _perhaps_decoded(
    records: Records,
    config: FiniteSource,
    data: DataConfig | None,
    resolution: int,
    form: PictureFormat,
    wanted: Wanted,
) -> Records:
    if data is None or data.decoded is None:
        return records
    unused = {"weight", "repeats", "wording", "shuffle_block", "columns", "folder_condition"}
    source = config.model_dump(mode="json", exclude=unused)
    of: dict[str, Any] = {"source": source, "stamp": _stamp(config, records)}
    if wanted.columns or wanted.folder_condition:
        of["conditions"] = {"columns": dict(wanted.columns), "folder": wanted.folder_condition}
    return decoded(records, Making(Path(data.decoded), resolution, data.aspect, data.workers, of, form))


def _stamp(config: FiniteSource, records: Records) -> str:
    """A digest that changes when the pictures or captions of a source do."""
    if isinstance(config, FolderSource):
        return stamp_of_files(files_of(Path(config.path)).files)
    if isinstance(config, HubSource):
        return str(getattr(records, "fingerprint", len(records)))
    return stamp_of_files(matching_files(config.files))


def open_records(config: FiniteSource, form: PictureFormat = RGB, wanted: Wanted = ALL) -> Records:
    """The records of a finite source."""
    if isinstance(config, FolderSource):
        suffixes = PICTURE_SUFFIXES if form.is_rgb else PICTURE_SUFFIXES | ARRAY_SUFFIXES
        return FolderRecords(config, suffixes, wanted)
    if isinstance(config, ParquetSource):
        return open_parquet(config, matching_files(config.files), wanted)
    if isinstance(config, WebDatasetSource):
        return _open_tars(config, wanted)
    return open_hub_table(config, wanted)


def check_places(sources: Iterable[SourceConfig]) -> None:
    """Raises CascadeError for a folder or file that does not exist, without reading any."""
    for source in sources:
        if isinstance(source, FolderSource) and not Path(source.path).is_dir():
            raise CascadeError(f"data source {source.path}: no such folder")
        if isinstance(source, ParquetSource | WebDatasetSource):
            matching_files(source.files)


def _open_tars(config: WebDatasetSource, wanted: Wanted = ALL) -> TarRecords:
    return TarRecords(matching_files(config.files), config.caption, config.caption_column, wanted)


def matching_files(patterns: Iterable[str]) -> list[str]:
    """The files that match the patterns, sorted within each. Raises CascadeError for a pattern without a match."""
    return [path for pattern in patterns for path in _files_of(pattern)]


def _files_of(pattern: str) -> list[str]:
    matches = matching(pattern)
    if not matches:
        hint = "; it is a folder: use folder/*.parquet" if Path(pattern).is_dir() else ""
        if "[" in pattern:
            hint = "; brackets match any letter inside them: write [[] for a literal ["
        raise CascadeError(f"data source {pattern}: no file matches{hint}")
    return matches
