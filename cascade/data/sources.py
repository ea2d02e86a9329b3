"""Sources and records built from a section of the settings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cascade.config.data import (
    DataConfig,
    FolderSource,
    HubSource,
    ParquetSource,
    ScenesSource,
    SourceConfig,
    WebDatasetSource,
)
from cascade.data.dataset import ALL, PICTURE_SUFFIXES, Records, Wanted
from cascade.data.decoded import Making, decoded, stamp_of_files
from cascade.data.folder import FolderRecords, files_of
from cascade.data.order import Key, SceneSource, ShardedSource, ShuffledSource, Source, StreamSource
from cascade.data.tables import open_hub_table, open_parquet, open_stream
from cascade.data.tars import TarRecords
from cascade.errors import CascadeError
from cascade.files.patterns import matching
from cascade.pixels import RGB, PictureFormat
from cascade.rasters import ARRAY_SUFFIXES

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
            _perhaps_decoded(tars, config, data, resolution, form), tars.starts, config.shuffle_block, key
        )
    return ShuffledSource(_perhaps_decoded(open_records(config, form, wanted), config, data, resolution, form), key)


def _perhaps_decoded(
    records: Records, config: FiniteSource, data: DataConfig | None, resolution: int, form: PictureFormat
) -> Records:
    if data is None or data.decoded is None:
        return records
    unused = {"weight", "repeats", "wording", "shuffle_block", "columns", "folder_condition"}
    source = config.model_dump(mode="json", exclude=unused)
    of = {"source": source, "stamp": _stamp(config, records)}
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
