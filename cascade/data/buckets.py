"""Aspect-ratio buckets: each batch holds pictures of one shape, so that training need not cut them to squares.

A bucket is a subset of every source's records. A batch belongs to one bucket, in proportion to the views that each
should have, and the views of a bucket mix its subsets as an ordinary run mixes its sources. So view n is still a
function of (settings, seed, n), and nothing needs to be saved or agreed upon between processes.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cascade.config.data import DataConfig, HubSource, ScenesSource, SourceConfig, WebDatasetSource
from cascade.config.stage import StageConfig
from cascade.data.records import BadRecordError, Record, Records, Wanted
from cascade.data.sources import Key, Mixture, SceneSource, ShardedSource, ShuffledSource, Source, open_records
from cascade.data.transforms import decode
from cascade.errors import CascadeError
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.reading import size_of_picture
from cascade.seeds import derive_seed

logger = logging.getLogger("cascade.data")

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Place:
    """Where a view comes from: the number of its source, that source (or its subset), the use of it, and the shape."""

    number: int
    source: Source
    use: int
    size: Size


def bucket_sizes(aspects: Sequence[float], stage: StageConfig) -> list[Size]:
    """The shape of each bucket: about the area of the stage's square, sides that its network can divide.

    aspects: width / height. Two that round to one shape are one bucket. For super-resolution the smaller picture's
    sides are whole numbers too.
    """
    step = math.lcm(stage.geometry.divisor, stage.scale)

    def side(exact: float) -> int:
        return max(step, round(exact / step) * step)

    root, resolution = [math.sqrt(aspect) for aspect in aspects], stage.resolution
    return list(dict.fromkeys((side(resolution / one), side(resolution * one)) for one in root))


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """The bucket whose aspect ratio is nearest, as a factor, to that of a picture of (height, width)."""
    aspect = math.log(size[1] / size[0])
    return min(range(len(buckets)), key=lambda place: abs(math.log(buckets[place][1] / buckets[place][0]) - aspect))


def size_of(record: Record, form: PictureFormat = RGB) -> Size | None:
    """Height and width of a record's picture, upright; None if it cannot be read.

    Of `rgb` from the picture's header; pictures of other formats are decoded, since they may be arrays.
    """
    if form.is_rgb and isinstance(record.image, bytes | Path | Image.Image):
        return size_of_picture(record.image)
    try:
        pixels = decode(record, form)
    except BadRecordError:
        return None
    return pixels.shape[-2], pixels.shape[-1]


class Subset:
    """Some of the records of a collection."""

    def __init__(self, records: Records, indices: Sequence[int]) -> None:
        """indices: increasing."""
        self._records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[self.indices[index]]

    def captions(self) -> Iterator[tuple[str, ...]]:
        """See `Records`; of the whole collection, since no picture is looked at."""
        return self._records.captions()


class Buckets:
    """The order of a run's views in buckets."""

    def __init__(self, data: DataConfig, stage: StageConfig, seed: int, unit: int) -> None:
        """unit: views that share a shape, a multiple of every pass and every process' share: those of a step.

        Reads the header of every picture. Raises CascadeError for a source whose pictures cannot be sorted.
        """
        assert data.buckets is not None
        self._unit, self._data = unit, data
        self.sizes = bucket_sizes(data.buckets, stage)
        sources: list[list[tuple[int, Source]]] = [[] for _ in self.sizes]
        weights: list[list[float]] = [[] for _ in self.sizes]
        counts = [0] * len(self.sizes)
        for number, config in enumerate(data.sources):
            for place, source, weight, count in self._parts(config, stage, (seed, "source", number)):
                sources[place].append((number, source))
                weights[place].append(weight)
                counts[place] += count
        used = [place for place, several in enumerate(sources) if several]
        self._used, self._sources = used, [sources[place] for place in used]
        totals = [sum(weights[place]) for place in used]
        self._order = Mixture(totals, derive_seed(seed, "buckets"))
        self._mixtures = [Mixture(weights[place], derive_seed(seed, "bucket", *self.sizes[place])) for place in used]
        said = (f"{self.sizes[place][1]}x{self.sizes[place][0]}: {counts[place]}" for place in used)
        logger.info("pictures by bucket: %s", ", ".join(said))

    def locate(self, view: int) -> Place:
        """The place of view number `view`."""
        step, position = divmod(view, self._unit)
        bucket, earlier = self._order.locate(step)
        part, use = self._mixtures[bucket].locate(earlier * self._unit + position)
        number, source = self._sources[bucket][part]
        return Place(number, source, use, self.sizes[self._used[bucket]])

    def _parts(self, config: SourceConfig, stage: StageConfig, key: Key) -> Iterator[tuple[int, Source, float, int]]:
        """(bucket, its part of a source, weight of that part, number of its records)."""
        if isinstance(config, ScenesSource):
            square = (stage.resolution, stage.resolution)
            if square not in self.sizes:
                raise CascadeError("data.buckets: drawn scenes are square; add 1 to the aspect ratios")
            yield self.sizes.index(square), SceneSource(config.held_out, stage.resolution, key), config.weight, 0
            return
        if isinstance(config, HubSource) and config.streaming:
            raise CascadeError("data.buckets: the pictures of a stream have unknown sizes; set streaming to false")
        records = open_records(config, stage.pictures, Wanted.of(config, stage))
        for place, indices in enumerate(self._sorted(records, stage.pictures)):
            if not indices:
                continue
            share = len(indices) / len(records)
            weight = config.weight * share if config.repeats is None else config.repeats * len(indices)
            own, subset = (*key, "bucket", *self.sizes[place]), Subset(records, indices)
            if isinstance(config, WebDatasetSource):
                starts = [bisect_left(indices, start) for start in records.starts]  # type: ignore[attr-defined]
                yield place, ShardedSource(subset, starts, config.shuffle_block, own), weight, len(indices)
            else:
                yield place, ShuffledSource(subset, own), weight, len(indices)

    def _sorted(self, records: Records, form: PictureFormat) -> list[list[int]]:
        """The indices of each bucket's records; one that cannot be read is found to be bad when it is used."""
        found: list[list[int]] = [[] for _ in self.sizes]
        for index in range(len(records)):
            try:
                size = size_of(records[index], form)
            except BadRecordError:
                size = None
            found[nearest(size or (1, 1), self.sizes)].append(index)
        return found
