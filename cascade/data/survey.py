"""Survey of a data source before a run: counts, sizes, broken and repeated pictures, captions."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cascade.config.data import DataConfig, HubSource, ScenesSource, SourceConfig
from cascade.config.stage import MeasuredRange, StageConfig
from cascade.data.folder import FolderRecords
from cascade.data.loader import Views
from cascade.data.records import BadRecordError, Record, Records, Wanted
from cascade.data.sources import SceneSource, open_records
from cascade.data.tables import open_stream
from cascade.data.transforms import condition_values, decode, prepared
from cascade.data.workers import read_by_workers
from cascade.errors import CascadeError
from cascade.pictures.format import PictureFormat
from cascade.pictures.images import contact_sheet, downsample
from cascade.pictures.rasters import shown
from cascade.settings import parse

logger = logging.getLogger("cascade.data")

ENDLESS_LIMIT = 1000
"""Records examined in a source of infinite or unknown length, unless another limit is given."""
MOST_MEASURED = 1000
"""Records of a source whose values are measured; of more, these are evenly spread."""
_VALUES_EACH = 4096
_CELL = 192


@dataclass(frozen=True)
class Finding:
    """One examined record. size: (width, height); digest: of its pixels; both None where it cannot be read."""

    origin: str
    captions: tuple[str, ...] = ()
    problem: str | None = None
    size: tuple[int, int] | None = None
    digest: bytes | None = None


@dataclass
class Survey:
    """The sum of findings. total: number of records in the source, None if unknown or infinite."""

    name: str
    total: int | None
    looked_at: int = 0
    problems: list[str] = field(default_factory=list)
    """Records that training skips, one line each with the reason."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    """(record, earlier record with the same pixels)."""
    captions: dict[str, int] = field(default_factory=dict)
    """Number of records with each caption."""
    _first: dict[bytes, str] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Count one record."""
        self.looked_at += 1
        if finding.problem is not None:
            self.problems.append(finding.problem)
        if finding.size is not None:
            self.sizes.append(finding.size)
        for caption in finding.captions:
            self.captions[caption] = self.captions.get(caption, 0) + 1
        if finding.digest is not None:
            earlier = self._first.setdefault(finding.digest, finding.origin)
            if earlier != finding.origin:
                self.copies.append((finding.origin, earlier))


def survey(source: SourceConfig, data: DataConfig, stage: StageConfig, limit: int | None) -> Survey:
    """Examine the records of a source: all, or `limit` evenly spread ones; the first ones of an endless source.

    data: the settings for views, including the number of worker processes. Every distinct caption and a fingerprint of
    every picture are held in memory.
    """
    look = partial(examine, data=data.model_copy(update={"jitter": 0.0}), stage=stage)  # slow, and rejects no record
    if isinstance(source, ScenesSource):
        drawn = SceneSource(source.held_out, stage.resolution, (0,))
        records: Iterable[Record] = (drawn.record(use) for use in itertools.count())
        return _sum(Survey("drawn scenes", None), _first(records, look, limit))
    if isinstance(source, HubSource) and source.streaming:
        stream = open_stream(source, Wanted.of(source, stage))
        return _sum(Survey(f"stream {source.name}", None), _first(stream(0), look, limit))
    finite = open_records(source, stage.pictures, Wanted.of(source, stage))
    chosen = range(len(finite)) if limit is None else _spread(len(finite), limit)
    examined = _Examined(finite, look)
    findings = read_by_workers(examined, chosen, data.workers) if data.workers else map(examined.__getitem__, chosen)
    found = _sum(Survey(_name(source), len(finite)), findings)
    found.problems += finite.problems if isinstance(finite, FolderRecords) else []
    return found


def with_range(stage: StageConfig, data: DataConfig) -> StageConfig:
    """The stage with the range of the data as numbers; unchanged unless its range is to be measured.

    Each named band has its own range; the channels of `rgb` share one, so that no colour shifts. Up to `MOST_MEASURED`
    records of each source are read, the same whatever the seed and the resolution, so that the stages of a cascade
    agree. Raises CascadeError for data without readable pictures, and for a band with a single value.
    """
    if not isinstance(stage.range, MeasuredRange):
        return stage
    form = stage.pictures
    values = [part for source in data.sources for part in _values(source, form)]
    if not values:
        raise CascadeError("stage.range: no picture could be read to measure it; give it as numbers")
    bands = np.concatenate(values, axis=1)
    together = bands if form.kind == "bands" else bands.reshape(1, -1)
    lows, highs = np.quantile(together, stage.range.quantiles, axis=1)
    if form.values != "float32":
        lows, highs = np.floor(lows), np.ceil(highs)
    for band, low, high in zip(form.bands, lows, highs, strict=False):
        if low >= high:
            raise CascadeError(f"stage.range: band {band} has the value {low:g} almost everywhere; give it as numbers")
    limits = [[float(low), float(high)] for low, high in zip(lows, highs, strict=True)]
    logger.info("range of the data: %s", ", ".join(f"{low:g} to {high:g}" for low, high in limits))
    return parse(StageConfig, {**stage.model_dump(mode="json"), "range": limits}, "stage")


def _values(source: SourceConfig, form: PictureFormat) -> Iterator[np.ndarray[Any, Any]]:
    """(C, n) values of each readable record, evenly spread over the source and the picture."""
    if isinstance(source, ScenesSource):
        return
    if isinstance(source, HubSource) and source.streaming:
        records: Iterable[Record] = itertools.islice(open_stream(source)(0), MOST_MEASURED)
    else:
        finite = open_records(source, form)
        records = (finite[index] for index in _spread(len(finite), MOST_MEASURED))
    records = iter(records)
    while True:
        try:
            picture = decode(next(records), form)
        except StopIteration:
            return
        except BadRecordError:  # counted and named when training reads it
            continue
        flat = picture.flatten(1).numpy()
        yield flat[:, :: -(-flat.shape[1] // _VALUES_EACH)].astype(np.float64)


def examine(record: Record, data: DataConfig, stage: StageConfig) -> Finding:
    """Build a view of one record, as in training."""
    try:
        pixels = decode(record, stage.pictures)
    except BadRecordError as error:
        return Finding(record.origin, record.captions, str(error))
    needed = stage.model.reads_text and data.uncaptioned == "skip"
    problem = f"{record.origin}: no caption" if needed and not record.captions else None
    try:
        condition_values(record, prepared(pixels, record, data, stage, random.Random(0)), stage)
    except BadRecordError as error:
        problem = str(error)
    height, width = pixels.shape[-2:]
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes() + bytes(f"{width}", "ascii"), digest_size=16)
    return Finding(record.origin, record.captions, problem, (width, height), digest.digest())


def view_sheet(
    data: DataConfig, stage: StageConfig, seed: int, count: int, as_read: Callable[[str], str] = str, unit: int = 1
) -> Image.Image:
    """The first `count` views of a run as the network will see them: cropped, resized, with the caption drawn.

    For super-resolution each view is next to its smaller picture (before noise), the record's own or the area mean,
    enlarged by repeating pixels. as_read: maps a caption to the text that the encoder reads. unit: see `Views`.
    """
    views = Views(data.model_copy(update={"decoded": None}), stage, seed, unit)  # nothing is stored for a preview
    cells: list[Image.Image] = []
    labels: list[str] = []
    for number in range(count):
        view = views[number]
        large, form = view.image[None], stage.pictures
        if stage.low_resolution is not None:
            size = (large.shape[-2] // stage.scale, large.shape[-1] // stage.scale)
            low = form.from_float(downsample(form.to_float(large), size))[0] if view.low is None else view.low
            cells.append(shown(low, form))
            labels.append(f"{max(size)} px" if view.low is None else f"{max(size)} px, its own")
        cells.append(shown(view.image, form))
        labels.append(as_read(view.caption) or "(null text)")
    columns = min(6, len(cells))
    return contact_sheet([_enlarged(cell) for cell in cells], columns, labels, max(_CELL, stage.resolution))


def _sum(survey: Survey, findings: Iterable[Finding]) -> Survey:
    for finding in findings:
        survey.add(finding)
    return survey


def _first(records: Iterable[Record], look: Callable[[Record], Finding], limit: int | None) -> Iterator[Finding]:
    return map(look, itertools.islice(records, limit or ENDLESS_LIMIT))


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` indices of `count`, evenly spread."""
    return [place * count // limit for place in range(limit)] if limit < count else list(range(count))


class _Examined(Dataset[Finding]):
    def __init__(self, records: Records, look: Callable[[Record], Finding]) -> None:
        self._records, self._look = records, look

    def __getitem__(self, index: int) -> Finding:
        try:
            return self._look(self._records[index])
        except BadRecordError as error:  # its caption cannot be read
            return Finding(f"record {index}", problem=str(error))


def _name(source: SourceConfig) -> str:
    section = source.model_dump()
    where = section.get("path") or section.get("name") or " ".join(section.get("files", ()))
    return f"{source.kind} {where}"


def _enlarged(image: Image.Image) -> Image.Image:
    """The picture enlarged by repeating pixels, so that the sheet shows single pixels."""
    factor = max(_CELL // max(image.size), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
