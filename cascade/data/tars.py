"""Records of WebDataset tar shards, read in place: any one is a seek away, so nothing need be read in order.

The headers of a shard are walked once. Where its members lie is written beside it, in `.cascade-index/`, and is
memory-mapped by whoever reads, so that a hundred workers hold it once.
"""

from __future__ import annotations

import bisect
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from torch import Tensor

from cascade.checkpoint import load_tensors, save_tensors
from cascade.data.dataset import PICTURE_SUFFIXES, BadRecordError, Record, caption_variants
from cascade.errors import CascadeError

logger = logging.getLogger("cascade.data")

INDEX_FOLDER = ".cascade-index"
_NOWHERE = (-1, 0)
_LOOKED_AT = 100  # members, of which what is missing is told


@dataclass(frozen=True)
class Shard:
    """One tar file and where its records lie.

    places: int64 (n, 4): start and size of the picture, start and size of the caption, in bytes; start -1: there is
    none. keys: the names of the records, joined; key_ends: int64 (n,), where each ends.
    """

    path: Path
    places: Tensor
    keys: Tensor
    key_ends: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        """What the members of a record are called, without their endings."""
        start = int(self.key_ends[index - 1]) if index else 0
        return bytes(self.keys[start : int(self.key_ends[index])].tolist()).decode(errors="replace")


class TarRecords:
    """The records of several shards, one after the other."""

    def __init__(self, files: Sequence[str], caption: str, caption_column: str) -> None:
        """caption: ending of the members that hold captions: lines of text, or JSON with `caption_column`.

        Raises CascadeError for a file that is no plain tar or ends too early, and where no record has such a caption.
        """
        self._shards = [open_shard(Path(file), caption) for file in files]
        self._caption_column = caption_column if caption.endswith("json") else None
        self.starts = list(accumulate((len(shard) for shard in self._shards), initial=0))
        if not len(self):
            raise CascadeError(f"data source {' '.join(files)}: the shards hold no records")
        _require_captions(self._shards, caption, self._caption_column)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        start, size, caption_start, caption_size = shard.places[row].tolist()
        origin = f"{shard.path}: {shard.key(row)}"
        try:
            with shard.path.open("rb") as file:
                picture = _bytes_at(file, start, size)
                caption = _bytes_at(file, caption_start, caption_size)
        except OSError as error:
            raise BadRecordError(origin, f"cannot be read: {error.strerror}") from None
        return Record(picture, _captions(caption, self._caption_column, origin), origin)

    def captions(self) -> Iterator[tuple[str, ...]]:
        for shard in self._shards:
            with shard.path.open("rb") as file:
                for row, (_, _, start, size) in enumerate(shard.places.tolist()):
                    with suppress(BadRecordError):
                        origin = f"{shard.path}: {shard.key(row)}"
                        yield _captions(_bytes_at(file, start, size), self._caption_column, origin)

    def _locate(self, index: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self.starts, index) - 1
        return self._shards[number], index - self.starts[number]


def open_shard(path: Path, caption: str) -> Shard:
    """The index of a shard: the one beside it if it was made of this very file, else a new one."""
    stat = path.stat()
    stamp = torch.tensor([stat.st_size, stat.st_mtime_ns])
    index = path.parent / INDEX_FOLDER / f"{path.name}.{caption}.safetensors"
    with suppress(CascadeError):  # none yet, or damaged: made anew
        tensors = load_tensors(index)
        if torch.equal(tensors["stamp"], stamp):
            return Shard(path, tensors["places"], tensors["keys"], tensors["key_ends"])
    shard = _walk(path, caption)
    try:
        save_tensors(index, {"stamp": stamp, "places": shard.places, "keys": shard.keys, "key_ends": shard.key_ends})
    except CascadeError as error:
        logger.info("%s; the shard's headers will be read again by every process", error)
    return shard


def _walk(path: Path, caption: str) -> Shard:
    """Group the members of a tar by key, as WebDataset does: neighbours whose names agree up to the first dot."""
    keys, places = [], []
    try:
        with tarfile.open(path, "r:") as tar:  # no compression: what is compressed has no places
            members = (member for member in tar if member.isfile())
            for key, group in groupby(members, lambda member: _split(member.name)[0]):
                # Only now: the members of a group are gone when the next one is asked for.
                found = {_split(member.name)[1]: (member.offset_data, member.size) for member in group}
                picture = next((place for ending, place in found.items() if f".{ending}" in PICTURE_SUFFIXES), _NOWHERE)
                keys.append(key.encode())
                places.append((*picture, *found.get(caption, _NOWHERE)))
        _require_end(path)
    except (tarfile.TarError, OSError) as error:
        raise CascadeError(
            f"{path}: not a whole, uncompressed tar file ({error}); unpack .tar.gz to .tar, or download it again"
        ) from None
    return Shard(
        path,
        torch.tensor(places, dtype=torch.int64).reshape(-1, 4),
        torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        torch.tensor(list(accumulate(len(key) for key in keys)), dtype=torch.int64),
    )


def _require_captions(shards: Sequence[Shard], ending: str, column: str | None) -> None:
    """A wrong ending or key is one mistake in the settings, not one of each record: it is told with what there is."""
    captioned = next((shard for shard in shards if bool((shard.places[:, 2] >= 0).any())), None)
    if captioned is None:
        path = next(shard.path for shard in shards if len(shard))
        there = ", ".join(_first_endings(path))
        raise CascadeError(f"{path}: no member ends in .{ending}; there are {there}; set the source's caption to one")
    objects = [] if column is None else _first_objects(captioned)
    if objects and not any(column in value for value in objects):
        keys = ", ".join(sorted({key for value in objects for key in value}))
        raise CascadeError(f"{captioned.path}: no key {column!r} in its .{ending} members; there are {keys}")


def _first_endings(path: Path) -> list[str]:
    """The endings of a shard's first members."""
    with tarfile.open(path, "r:") as tar:
        return sorted({_split(member.name)[1] for member in islice(tar, _LOOKED_AT) if member.isfile()})


def _first_objects(shard: Shard) -> list[dict[str, object]]:
    """What a shard's first JSON members with captions say, as far as they can be read."""
    values = []
    with shard.path.open("rb") as file:
        for _, _, start, size in shard.places[shard.places[:, 2] >= 0][:_LOOKED_AT].tolist():
            with suppress(ValueError):
                values.append(json.loads(_bytes_at(file, start, size) or b""))
    return [value for value in values if isinstance(value, dict)]


def _require_end(path: Path) -> None:
    """The library takes a torn header for the end; a whole tar ends with a block of zeros."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read() != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _split(name: str) -> tuple[str, str]:
    """`folder/0001.seg.png` -> (`folder/0001`, `seg.png`)."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()


def _bytes_at(file: BinaryIO, start: int, size: int) -> bytes | None:
    if start < 0:
        return None
    file.seek(start)
    return file.read(size)


def _captions(text: bytes | None, column: str | None, origin: str) -> tuple[str, ...]:
    """column: None for lines of text, else the key of a JSON object. Raises BadRecordError for other bytes."""
    if text is None:
        return ()
    try:
        if column is None:
            return caption_variants(text.decode("utf-8-sig").splitlines())
        value = json.loads(text)
    except ValueError as error:
        raise BadRecordError(origin, f"its caption is not readable: {error}") from None
    return caption_variants(value.get(column) if isinstance(value, dict) else None)
