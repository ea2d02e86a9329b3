"""Records of WebDataset tar shards, read by random access through an index of each shard."""

from __future__ import annotations

import bisect
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import accumulate, chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from cascade.data.records import ALL, PICTURE_SUFFIXES, BadRecordError, Record, Wanted, caption_variants
from cascade.errors import CascadeError, quoted
from cascade.files.containers import BadTarError, members
from cascade.files.paths import is_hidden
from cascade.files.tensors import load_tensors, save_tensors
from cascade.files.text import decoded, parse_json
from cascade.pictures.rasters import ARRAY_SUFFIXES

# --- tar index -------------------------------------------------------------------------------------------------------
# Index of the records in a tar shard, made by reading its headers once.
#
# The index is written next to the shard, in `.cascade-index/`, and memory-mapped, so that a hundred workers share one
# copy.

logger = logging.getLogger("cascade.data")

INDEX_FOLDER = ".cascade-index"
_INDEX_FORMAT = 4
_Place: TypeAlias = tuple[int, int]
"""Start and size of a member's content, in bytes."""
_NOWHERE: _Place = (-1, 0)


@dataclass(frozen=True)
class Shard:
    """One tar file and the places of its records.

    pictures: int64 (n, 2), start and size in bytes; start -1: no picture. captions: int64 (m, 2), start and size of the
    captions of all records, in order; caption_ends: int64 (n,), end of each record's captions in that list. keys:
    uint8, the joined names of the records; key_ends: int64 (n,), end of each name.
    """

    path: Path
    pictures: Tensor
    captions: Tensor
    caption_ends: Tensor
    keys: Tensor
    key_ends: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        """The common name of a record's members, without their endings."""
        return bytes(_part(self.keys, self.key_ends, index).tolist()).decode(errors="replace")

    def captions_of(self, index: int) -> list[tuple[int, int]]:
        """(start, size) of each caption of a record."""
        return [(start, size) for start, size in _part(self.captions, self.caption_ends, index).tolist()]


def open_shard(path: Path, caption: str) -> Shard:
    """The index of a shard: the stored one if it belongs to this version of the file, else a new one."""
    stat = path.stat()
    stamp = torch.tensor([_INDEX_FORMAT, stat.st_size, stat.st_mtime_ns])
    index = path.parent / INDEX_FOLDER / f"{path.name}.{caption}.safetensors"
    tensors = _kept(index, stamp) or _walk(path, caption)
    try:
        save_tensors(index, {"stamp": stamp, **tensors})
    except CascadeError as error:
        logger.info("%s; every process will read the shard's headers again", error)
    return Shard(path, **tensors)


def _kept(index: Path, stamp: Tensor) -> dict[str, Tensor] | None:
    """The tensors of a stored index of this version of the file; None if it is outdated, damaged or missing."""
    try:
        tensors = load_tensors(index)
    except CascadeError:
        return None
    same = torch.equal(tensors.pop("stamp", torch.empty(0)), stamp)
    names = {field.name for field in fields(Shard)} - {"path"}
    return tensors if same and tensors.keys() == names and _fit(tensors, int(stamp[1])) else None


def _fit(tensors: dict[str, Tensor], size: int) -> bool:
    """Whether they have the shapes of an index, and no place lies outside the shard of `size` bytes."""
    keys, rest = tensors["keys"], {name: value for name, value in tensors.items() if name != "keys"}
    if keys.dtype != torch.uint8 or keys.ndim != 1 or any(value.dtype != torch.int64 for value in rest.values()):
        return False
    count = len(tensors["pictures"]) if tensors["pictures"].ndim else -1
    for name, joined in (("key_ends", keys), ("caption_ends", tensors["captions"])):
        ends = tensors[name]
        if ends.shape != (count,) or bool((ends.diff(prepend=ends.new_zeros(1)) < 0).any()):
            return False
        if joined.ndim == 0 or (int(ends[-1]) if count else 0) != len(joined):
            return False
    for name in ("pictures", "captions"):
        places = tensors[name]
        if places.ndim != 2 or places.shape[1] != 2:
            return False
        start, length = places.unbind(dim=1)
        first = -1 if name == "pictures" else 0  # `_NOWHERE`
        if bool(((start < first) | (length < 0) | (length > size) | (start > size - length)).any()):
            return False
    return True


def _walk(path: Path, caption: str) -> dict[str, Tensor]:
    """The tensors of a shard's index, from the headers of its members.

    Members are grouped by key as in WebDataset: neighbours whose names agree up to the first dot. Hidden ones, such as
    macOS's `._0001.jpg`, are skipped.
    """
    keys: list[bytes] = []
    pictures: list[_Place] = []
    captions: list[list[_Place]] = []
    try:
        seen = (member for member in members(path) if not is_hidden(member.name))
        for key, group in groupby(seen, lambda member: split_name(member.name)[0]):
            # Collected here, because groupby discards a group's members when it moves to the next.
            found = [(split_name(member.name)[1], (member.offset_data, member.size)) for member in group]
            for picture, own_captions in _records(found, caption):
                keys.append(key.encode(errors="surrogateescape"))
                pictures.append(picture)
                captions.append(own_captions)
        _require_end(path)
    except OSError as error:
        raise CascadeError(
            f"{path}: not a complete, uncompressed tar file ({error}); unpack .tar.gz to .tar, or download it again"
        ) from None
    return {
        "pictures": _places(pictures),
        "captions": _places(chain.from_iterable(captions)),
        "caption_ends": _ends(captions),
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "key_ends": _ends(keys),
    }


def _records(members: Sequence[tuple[str, _Place]], caption: str) -> list[tuple[_Place, list[_Place]]]:
    """(picture, captions) of the records in the members of one key, given as (ending, place); usually one record.

    Several captions of one picture are variants. A key with several pictures is as many records: with an equal number
    of captions they are paired in order, otherwise each record gets all captions. An array is a picture where there is
    no other; beside one it may be anything, such as an embedding.
    """
    endings = [ending for ending, _ in members]
    known = (
        ending for suffixes in (PICTURE_SUFFIXES, ARRAY_SUFFIXES) for ending in endings if f".{ending}" in suffixes
    )
    first = next(known, None)
    pictures = [place for ending, place in members if ending == first] or [_NOWHERE]
    captions = [place for ending, place in members if ending == caption]
    if len(pictures) > 1 and len(captions) == len(pictures):
        return [(picture, [own]) for picture, own in zip(pictures, captions, strict=True)]
    return [(picture, captions) for picture in pictures]


def _places(places: Iterable[_Place]) -> Tensor:
    return torch.tensor(list(places), dtype=torch.int64).reshape(-1, 2)


def _ends(parts: Sequence[Sized]) -> Tensor:
    """The end of each part in their concatenation."""
    return torch.tensor(list(accumulate(map(len, parts))), dtype=torch.int64)


def _part(joined: Tensor, ends: Tensor, index: int) -> Tensor:
    return joined[int(ends[index - 1]) if index else 0 : int(ends[index])]


def _require_end(path: Path) -> None:
    """Check for the block of zeros at the end of a complete tar; `tarfile` takes a truncated header for the end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read() != tarfile.NUL * tarfile.BLOCKSIZE:
            raise BadTarError("its end is missing")


def split_name(name: str) -> tuple[str, str]:
    """`folder/0001.seg.png` -> (`folder/0001`, `seg.png`)."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


# --- tars ------------------------------------------------------------------------------------------------------------

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
