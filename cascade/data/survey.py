"""What a data source holds: counts, sizes, broken and repeated pictures, captions. To be known before a run."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image
from torch.utils.data import Dataset

from cascade.config import DataConfig, HubSource, ScenesSource, SourceConfig, StageConfig
from cascade.data.dataset import BadRecordError, Record, Records
from cascade.data.loader import Views, read_by_workers
from cascade.data.order import SceneSource
from cascade.data.sources import open_records
from cascade.data.tables import open_stream
from cascade.data.transforms import decode
from cascade.images import contact_sheet, downsample, to_float, to_pil

ENDLESS_LIMIT = 1000
"""Records looked at of what has no end or no known one, unless another limit is given."""
_CELL = 192


@dataclass(frozen=True)
class Finding:
    """One record, looked at. size: (width, height); digest: of its pixels; both None where it cannot be read."""

    origin: str
    captions: tuple[str, ...] = ()
    problem: str | None = None
    size: tuple[int, int] | None = None
    digest: bytes | None = None


@dataclass
class Survey:
    """Findings, added up. total: how many records there are, None when that has no answer."""

    name: str
    total: int | None
    looked_at: int = 0
    problems: list[str] = field(default_factory=list)
    """Broken pictures and records without caption, each in a line."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    """Records with the pixels of an earlier one, and that one."""
    captions: dict[str, int] = field(default_factory=dict)
    """How often each is there."""
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


def survey(source: SourceConfig, stage: StageConfig, limit: int | None, workers: int = 0) -> Survey:
    """Look at the records of a source: all, or `limit` of them, spread evenly; of what is endless the first ones.

    workers: processes that decode. Every distinct caption and a fingerprint of every picture are held in memory.
    """
    if isinstance(source, ScenesSource):
        drawn = SceneSource(source.held_out, stage.resolution, (0,))
        records: Iterable[Record] = (drawn.record(use) for use in itertools.count())
        return _sum(Survey("drawn scenes", None), _first(records, limit))
    if isinstance(source, HubSource) and source.streaming:
        return _sum(Survey(f"stream {source.name}", None), _first(open_stream(source)(0), limit))
    finite = open_records(source)
    chosen = range(len(finite)) if limit is None else _spread(len(finite), limit)
    return _sum(Survey(_name(source), len(finite)), _examined(finite, chosen, workers))


def examine(record: Record) -> Finding:
    """Decode one record."""
    try:
        pixels = decode(record)
    except BadRecordError as error:
        return Finding(record.origin, record.captions, str(error))
    problem = None if record.captions else f"{record.origin}: no caption"
    height, width = pixels.shape[-2:]
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes() + bytes(f"{width}", "ascii"), digest_size=16)
    return Finding(record.origin, record.captions, problem, (width, height), digest.digest())


def view_sheet(data: DataConfig, stage: StageConfig, seed: int, count: int) -> Image.Image:
    """The first `count` views of a run as the network will see them: cropped, resized, with the caption drawn.

    For super-resolution each beside its smaller picture (before noise), which is enlarged by repeating pixels.
    """
    views = Views(data, stage, seed)
    cells: list[Image.Image] = []
    labels: list[str] = []
    for number in range(count):
        view = views[number]
        large = view.image[None]
        label = view.caption or "(null text)"
        if stage.low_resolution is not None:
            size = large.shape[-1] * stage.low_resolution // stage.resolution
            cells += to_pil(downsample(to_float(large), size))
            labels.append(f"{size} px")
        cells += to_pil(to_float(large))
        labels.append(label)
    columns = min(6, len(cells))
    return contact_sheet([_enlarged(cell) for cell in cells], columns, labels, max(_CELL, stage.resolution))


def _sum(survey: Survey, findings: Iterable[Finding]) -> Survey:
    for finding in findings:
        survey.add(finding)
    return survey


def _first(records: Iterable[Record], limit: int | None) -> Iterator[Finding]:
    return (examine(record) for record in itertools.islice(records, limit or ENDLESS_LIMIT))


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly spread."""
    return [place * count // limit for place in range(limit)] if limit < count else list(range(count))


class _Examined(Dataset[Finding]):
    def __init__(self, records: Records) -> None:
        self._records = records

    def __getitem__(self, index: int) -> Finding:
        try:
            return examine(self._records[index])
        except BadRecordError as error:  # its caption cannot be read
            return Finding(f"record {index}", problem=str(error))


def _examined(records: Records, chosen: Iterable[int], workers: int) -> Iterator[Finding]:
    examined = _Examined(records)
    return read_by_workers(examined, chosen, workers) if workers else (examined[index] for index in chosen)


def _name(source: SourceConfig) -> str:
    section = source.model_dump()
    where = section.get("path") or section.get("name") or " ".join(section.get("files", ()))
    return f"{source.kind} {where}"


def _enlarged(image: Image.Image) -> Image.Image:
    """By repeating pixels, so that the sheet shows pixels and not a resize."""
    factor = max(_CELL // max(image.size), 1)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
