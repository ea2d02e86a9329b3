"""Records of WebDataset tar shards, read by random access within the tar files."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO

from cascade.data.dataset import ALL, BadRecordError, Record, Wanted, caption_variants
from cascade.data.tar_index import Shard, open_shard, split_name
from cascade.errors import CascadeError
from cascade.files.parsed import parse_json
from cascade.files.tar import members
from cascade.files.text import decoded
from cascade.files.walk import is_hidden
from cascade.quoting import quoted

_LOOKED_AT = 100  # members listed in an error about a missing ending or key


class TarRecords:
    """The records of several shards, one after the other."""

    def __init__(self, files: Sequence[str], caption: str, caption_column: str, wanted: Wanted = ALL) -> None:
        """caption: ending of the members that hold captions: lines of text, or JSON with `caption_column`.

        Raises CascadeError for a file that is not an uncompressed tar or is truncated, and if no record has a caption.
        """
        self._shards = [open_shard(Path(file), caption) for file in files]
        self._caption_column = caption_column if caption.endswith("json") else None
        self._wanted = wanted
        if wanted.columns and self._caption_column is None:
            raise CascadeError(
                f"data source {' '.join(files)}: conditions are read from JSON members; set the source's caption: json"
            )
        self.starts = list(accumulate((len(shard) for shard in self._shards), initial=0))
        if not len(self):
            raise CascadeError(f"data source {' '.join(files)}: the shards hold no records")
        if wanted.captions or wanted.columns:
            _require_captions(self._shards, caption, self._caption_column if wanted.captions else None)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        origin = f"{shard.path}: {shard.key(row)}"
        try:
            with shard.path.open("rb") as file:
                start, size = shard.pictures[row].tolist()
                picture = None if start < 0 else _bytes_at(file, start, size)
                values = self._values(shard, row, file) if self._wanted.columns else {}
                return Record(picture, self._captions(shard, row, file, origin), origin, values=values)
        except OSError as error:
            raise BadRecordError(origin, f"cannot be read: {error.strerror}") from None

    def captions(self) -> Iterator[tuple[str, ...]]:
        for shard in self._shards:
            try:
                with shard.path.open("rb") as file:
                    for row in range(len(shard)):
                        with suppress(BadRecordError):
                            yield self._captions(shard, row, file, f"{shard.path}: {shard.key(row)}")
            except OSError as error:
                raise CascadeError(f"{shard.path}: cannot be read: {error.strerror or error}") from None

    def _captions(self, shard: Shard, row: int, file: BinaryIO, origin: str) -> tuple[str, ...]:
        """The variants in all captions of a record, each once. Raises BadRecordError."""
        texts = [_bytes_at(file, *place) for place in shard.captions_of(row)]
        variants = (variant for text in texts for variant in _variants(text, self._caption_column, origin))
        return tuple(dict.fromkeys(variants))

    def _values(self, shard: Shard, row: int, file: BinaryIO) -> dict[str, object]:
        """The values of conditions in a record's JSON members."""
        merged: dict[str, object] = {}
        for place in shard.captions_of(row):
            with suppress(ValueError):
                found = parse_json(_bytes_at(file, *place))
                merged |= found if isinstance(found, dict) else {}
        return self._wanted.values(merged)

    def _locate(self, index: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return self._shards[number], index - self.starts[number]


def _require_captions(shards: Sequence[Shard], ending: str, column: str | None) -> None:
    """Raise CascadeError, with the existing endings or keys, if the settings name an ending or key without a match."""
    captioned = next((shard for shard in shards if len(shard.captions)), None)
    if captioned is None:
        path = next(shard.path for shard in shards if len(shard))
        there = ", ".join(_first_endings(path))
        raise CascadeError(f"{path}: no member ends in .{ending}, only in {there}; set the source's caption to one")
    objects = [] if column is None else _first_objects(captioned)
    if objects and not any(column in value for value in objects):
        keys = ", ".join(sorted({key for value in objects for key in value}))
        raise CascadeError(f"{captioned.path}: no key {quoted(column)} in its .{ending} members; the keys are {keys}")


def _first_endings(path: Path) -> list[str]:
    """The endings of a shard's first members."""
    seen = (member for member in islice(members(path), _LOOKED_AT) if not is_hidden(member.name))
    return sorted({split_name(member.name)[1] for member in seen})


def _first_objects(shard: Shard) -> list[dict[str, object]]:
    """The readable JSON objects among a shard's first caption members."""
    values = []
    with shard.path.open("rb") as file:
        for start, size in shard.captions[:_LOOKED_AT].tolist():
            with suppress(ValueError):
                values.append(parse_json(_bytes_at(file, start, size)))
    return [value for value in values if isinstance(value, dict)]


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _variants(text: bytes, column: str | None, origin: str) -> tuple[str, ...]:
    """column: None for lines of text, else the key of a JSON object. Raises BadRecordError for other bytes."""
    try:
        if column is None:
            return caption_variants(decoded(text).split("\n"))
        value = parse_json(text)
    except ValueError as error:
        raise BadRecordError(origin, f"its caption is not readable: {error}") from None
    return caption_variants(value.get(column) if isinstance(value, dict) else None)
