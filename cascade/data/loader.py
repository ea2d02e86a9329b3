"""Batches. View n of a run is a function of (settings, seed, n), so the only state to save is a number.

The numbers of workers and processes do not change view n: they only divide the numbers among themselves.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cascade.conditioning import NULL_TEXT, Given
from cascade.conditions.settings import Value
from cascade.conditions.values import joined
from cascade.config.data import (
    DataConfig,
    FolderSource,
    HubSource,
    ParquetSource,
    ScenesSource,
    SourceConfig,
    WebDatasetSource,
    WordingConfig,
)
from cascade.config.stage import StageConfig
from cascade.data.buckets import Buckets, Place
from cascade.data.records import BadRecordError, Record, Wanted, has_endless_wordings, wordings
from cascade.data.sources import Mixture, ShardedSource, ShuffledSource, Source, open_records, open_source
from cascade.data.tables import open_stream
from cascade.data.transforms import choose_caption, condition_values, decode, dropped, prepared
from cascade.data.workers import read_by_workers
from cascade.errors import CascadeError
from cascade.pictures.format import RGB, PictureFormat
from cascade.seeds import derive_seed

logger = logging.getLogger("cascade.data")

MAX_ATTEMPTS = 50
"""Records tried for one view before giving up."""
PATIENCE = 20
"""Records read before the share of bad ones is checked."""


@dataclass(frozen=True)
class View:
    """One picture with one caption.

    image: (C, S, S) as stored, or (C, H, W) of its bucket.  sample: its number in the run.  bad: the problem of each
    bad record that was tried first for this view.  low: (C, s, s), its smaller picture where that is not the area mean.
    values: of the stage's conditions, after dropout.  lacks: what its record lacks, the caption or conditions; it
    counts as dropped.  mask: (1, S, S) for the loss, 255 where the picture counts.
    """

    image: Tensor
    caption: str
    sample: int
    bad: tuple[str, ...] = ()
    low: Tensor | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """images: (B, C, S, S) as stored, or (B, C, H, W) of one bucket.  captions: "" where dropped.

    samples: their numbers in the run.  lows: (C, s, s), by index in the batch: smaller pictures that are not the area
    mean.
    of_captions: the result of the caller's function of the captions, computed in the process that read them.
    given: the stage's conditions, by name.  masks: (1, S, S), by index in the batch.
    """

    images: Tensor
    captions: list[str]
    samples: list[int]
    lows: Mapping[int, Tensor] = field(default_factory=dict)
    of_captions: object = None
    given: Mapping[str, Given] = field(default_factory=dict)
    masks: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)


OfCaptions = Callable[[list[str]], object]
"""A function of a batch's captions, called in the process that reads them."""


@dataclass(frozen=True)
class _Share:
    """A batch, and the problems of the bad records before each of its views.

    Joined in the reading process: sending one tensor to another process takes as long as sending a whole batch.
    """

    batch: Batch
    bad: list[tuple[str, ...]]
    lacks: tuple[str, ...] = ()

    @classmethod
    def of(cls, views: Sequence[View], of_captions: OfCaptions | None, stage: StageConfig) -> _Share:
        captions = [view.caption for view in views]
        size = (views[0].image.shape[-2], views[0].image.shape[-1])
        batch = Batch(
            images=torch.stack([view.image for view in views]),
            captions=captions,
            samples=[view.sample for view in views],
            lows={place: view.low for place, view in enumerate(views) if view.low is not None},
            of_captions=None if of_captions is None else of_captions(captions),
            given=joined(stage.conditions, [view.values for view in views], size),
            masks={place: view.mask for place, view in enumerate(views) if view.mask is not None},
        )
        lacks = dict.fromkeys(itertools.chain.from_iterable(view.lacks for view in views))
        return cls(batch, [view.bad for view in views], tuple(lacks))


class Views(Dataset[View]):
    """All views of a run: `views[n]` for any n >= 0. Opening reads the sources' listings, no pictures."""

    def __init__(self, data: DataConfig, stage: StageConfig, seed: int, unit: int = 1) -> None:
        """unit: with `data.buckets`, views that share a shape; see `Buckets`."""
        self._data = data
        self._stage = stage
        self._seed = seed
        self._wordings = [getattr(source, "wording", WordingConfig()) for source in data.sources]
        if data.buckets is not None:
            self._locate = Buckets(data, stage, seed, unit).locate
            return
        self._locate = self._in_squares
        self._sources = [
            open_source(
                source, stage.resolution, (seed, "source", index), data, stage.pictures, Wanted.of(source, stage)
            )
            for index, source in enumerate(data.sources)
        ]
        self._mixture = Mixture([_weight(*pair) for pair in zip(data.sources, self._sources, strict=True)], seed)

    def _in_squares(self, view: int) -> Place:
        """The place of a view of a run without buckets."""
        number, use = self._mixture.locate(view)
        return Place(number, self._sources[number], use, (self._stage.resolution, self._stage.resolution))

    def __getitem__(self, sample: int) -> View:
        place = self._locate(sample)
        bad: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            # Two generators, so that a caption setting does not change the pictures.
            picture_rng, caption_rng = (
                random.Random(derive_seed(self._seed, purpose, sample)) for purpose in ("picture", "caption")
            )
            try:
                record = place.source.record(place.use, attempt)
                caption = self._caption(record, caption_rng, self._wordings[place.number])
                pixels = decode(record, self._stage.pictures)
                shown = prepared(pixels, record, self._data, self._stage, picture_rng, place.size)
                values = condition_values(record, shown, self._stage)
            except BadRecordError as error:
                bad.append(str(error))
            else:
                lacks = tuple(f"condition {name}" for name, value in values.items() if value is None)
                lacks += ("caption",) * (self._stage.model.reads_text and not record.captions)
                if values:
                    rng = random.Random(derive_seed(self._seed, "conditions", sample))
                    values, together = dropped(values, self._data, self._stage, rng)
                    caption = NULL_TEXT if together else caption
                return View(shown.picture, caption, sample, tuple(bad), shown.low, values, lacks, shown.mask)
        raise CascadeError(f"data: {MAX_ATTEMPTS} records in a row are broken or have no caption; the first: {bad[0]}")

    def _caption(self, record: Record, rng: random.Random, wording: WordingConfig) -> str:
        """A record's caption for a view. Raises BadRecordError for one without, unless the stage can do without."""
        if not record.captions and (self._data.uncaptioned == "drop" or not self._stage.model.reads_text):
            return NULL_TEXT
        return choose_caption(record, self._data.caption_dropout, rng, wording)


def _weight(config: SourceConfig, source: Source) -> float:
    """A source's share of the views, relative to the others': its weight, or its repeats for each of its records."""
    if isinstance(config, ScenesSource) or config.repeats is None:
        return config.weight
    if isinstance(source, ShuffledSource | ShardedSource):
        return config.repeats * source.count
    raise CascadeError("data.sources: repeats of a stream, whose number of records is not known; set weight instead")


class BadRecords:
    """Counts bad records, logs each once, and stops the run when there are too many."""

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._named: dict[str, None] = {}
        self._seen = 0
        self._bad = 0

    def add(self, bad: Sequence[str]) -> None:
        """Count a view and the problems of the bad records that were tried first for it.

        Raises CascadeError when the share of bad records exceeds the limit by more than chance.
        """
        self._seen += 1 + len(bad)
        self._bad += len(bad)
        for message in bad:
            if message not in self._named:
                self._named[message] = None
                logger.warning("skipped %s", message)
        if bad and self._seen >= PATIENCE and self._too_many():
            first = "; ".join(list(self._named)[:3])
            raise CascadeError(
                f"data: {self._bad} of {self._seen} records are broken or have no caption, more than"
                f" data.max_bad_share {self._max_share:g}: {first}; repair them or raise the limit"
            )

    def add_good(self, views: int) -> None:
        """Count views before which no bad record was tried."""
        self._seen += views

    def _too_many(self) -> bool:
        # A margin of two standard deviations: 2 of the first 20 are often bad when 1 in 100 is.
        expected = self._seen * self._max_share
        return self._bad > expected + 2 * math.sqrt(expected * (1 - self._max_share))


@dataclass(frozen=True)
class Portion:
    """The part of the batches that a process reads: its number, the number of processes, and the first batch.

    unit: with `data.buckets`, views of all processes that share a shape, a multiple of the batch; None: a batch.
    """

    process: int = 0
    processes: int = 1
    first_batch: int = 0
    unit: int | None = None


def batches(
    data: DataConfig,
    stage: StageConfig,
    seed: int,
    *,
    batch_size: int,
    portion: Portion | None = None,
    of_captions: OfCaptions | None = None,
) -> Generator[Batch, None, None]:
    """Endless batches: batch i holds samples [i * batch_size, (i + 1) * batch_size), or this process' part.

    batch_size: of all processes together; each takes a contiguous share.  portion: default all from the beginning.
    of_captions: called with each batch's captions in the process that reads the records, a worker if data.workers > 0;
    its result is `Batch.of_captions`.  A streaming source is read by every worker of every process from its start, each
    keeping its own share. Close the iterator to end the workers.
    """
    portion = portion or Portion()
    count, rest = divmod(batch_size, portion.processes)
    if rest:
        raise ValueError(f"batch_size {batch_size} cannot be shared equally by {portion.processes} processes")
    numbers = _sample_numbers(batch_size, count, portion.first_batch, portion.process)
    views = Views(data, stage, seed, portion.unit or batch_size)
    shares = _loaded(_Shares(views, of_captions, stage), numbers, data.workers)
    return _checked(shares, BadRecords(data.max_bad_share))


def _sample_numbers(batch_size: int, share: int, first_batch: int, process: int) -> Iterator[list[int]]:
    start = first_batch * batch_size + process * share
    while True:
        yield list(range(start, start + share))
        start += batch_size


def _checked(shares: Generator[_Share, None, None], bad_records: BadRecords) -> Generator[Batch, None, None]:
    # Closed immediately in any case: an error's traceback would keep the workers alive.
    said = set[str]()
    with closing(shares):
        for share in shares:
            for what in share.lacks:
                if what not in said:
                    said.add(what)
                    logger.warning("some records have no %s; they are trained as if it were dropped", what)
            if any(share.bad):
                for bad in share.bad:
                    bad_records.add(bad)
            else:
                bad_records.add_good(len(share.bad))
            yield share.batch


def _loaded(shares: _Shares, numbers: Iterator[list[int]], workers: int) -> Generator[_Share, None, None]:
    if workers == 0:
        yield from map(shares.read, numbers)
        return
    with closing(read_by_workers(shares, numbers, workers)) as loaded:
        for share in loaded:
            if isinstance(share, CascadeError):
                raise share
            yield share


class _Shares(Dataset["_Share | CascadeError"]):
    """Several views by their numbers. A CascadeError is returned, as raising it in a worker prints a traceback."""

    def __init__(self, views: Views, of_captions: OfCaptions | None, stage: StageConfig) -> None:
        self._views = views
        self._of_captions = of_captions
        self._stage = stage

    def read(self, numbers: list[int]) -> _Share:
        """The views of these numbers. Raises CascadeError."""
        return _Share.of([self._views[number] for number in numbers], self._of_captions, self._stage)

    def __getitem__(self, numbers: list[int]) -> _Share | CascadeError:
        try:
            return self.read(numbers)
        except CascadeError as error:
            return error


def captions_of(sources: Iterable[SourceConfig], form: PictureFormat = RGB) -> Iterator[str]:
    """Every caption variant of finite sources, in order of appearance, with repetitions; no picture is decoded.

    Drawn scenes and shuffled tags are endless: their captions are encoded during training. form: of the
    pictures; it decides which files of a folder count.
    """
    for source in sources:
        if isinstance(source, ScenesSource):
            continue
        if has_endless_wordings(source.wording):
            logger.warning("captions of shuffled or dropped tags are not encoded beforehand, but during training")
            continue
        for variant in itertools.chain.from_iterable(_variants_of(source, form)):
            yield from wordings(variant, source.wording)


def _variants_of(
    source: FolderSource | ParquetSource | WebDatasetSource | HubSource, form: PictureFormat
) -> Iterator[tuple[str, ...]]:
    if not (isinstance(source, HubSource) and source.streaming):
        return open_records(source, form).captions()
    logger.info("data source %s: reading the whole stream once, for its captions", source.name)
    return (record.captions for record in open_stream(source)(0))
