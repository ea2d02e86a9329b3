"""Where the records of a tar shard lie: its headers are walked once.

What they say is written beside the shard, in `.cascade-index/`, and is memory-mapped by whoever reads, so that a
hundred workers hold it once.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, fields
from itertools import accumulate, chain, groupby
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import torch
from torch import Tensor

from cascade.checkpoint import load_tensors, save_tensors
from cascade.data.dataset import PICTURE_SUFFIXES
from cascade.errors import CascadeError
from cascade.files.walk import is_hidden

logger = logging.getLogger("cascade.data")

INDEX_FOLDER = ".cascade-index"
_INDEX_FORMAT = 3
_Place: TypeAlias = tuple[int, int]
"""Start and size of a member's content, in bytes."""
_NOWHERE: _Place = (-1, 0)


@dataclass(frozen=True)
class Shard:
    """One tar file and where its records lie.

    pictures: int64 (n, 2), start and size in bytes; start -1: there is none. captions: int64 (m, 2), those of all
    records, one after the other; caption_ends: int64 (n,), where each record's end. keys: uint8, the names of the
    records, joined; key_ends: int64 (n,), where each ends.
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
        """What the members of a record are called, without their endings."""
        return bytes(_part(self.keys, self.key_ends, index).tolist()).decode(errors="replace")

    def captions_of(self, index: int) -> list[tuple[int, int]]:
        """(start, size) of each caption of a record."""
        return [(start, size) for start, size in _part(self.captions, self.caption_ends, index).tolist()]


def open_shard(path: Path, caption: str) -> Shard:
    """The index of a shard: the one beside it if it was made of this very file, else a new one."""
    stat = path.stat()
    stamp = torch.tensor([_INDEX_FORMAT, stat.st_size, stat.st_mtime_ns])
    index = path.parent / INDEX_FOLDER / f"{path.name}.{caption}.safetensors"
    tensors = _kept(index, stamp) or _walk(path, caption)
    try:
        save_tensors(index, {"stamp": stamp, **tensors})
    except CascadeError as error:
        logger.info("%s; the shard's headers will be read again by every process", error)
    return Shard(path, **tensors)


def _kept(index: Path, stamp: Tensor) -> dict[str, Tensor] | None:
    """The tensors of an index that was made of this very file; None for any other, a damaged one, or none."""
    try:
        tensors = load_tensors(index)
    except CascadeError:
        return None
    same = torch.equal(tensors.pop("stamp", torch.empty(0)), stamp)
    return tensors if same and tensors.keys() == {field.name for field in fields(Shard)} - {"path"} else None


def _walk(path: Path, caption: str) -> dict[str, Tensor]:
    """The tensors of a shard's index, from the headers of its members.

    They are grouped by key, as WebDataset does: neighbours whose names agree up to the first dot. Hidden ones, such as
    the `._0001.jpg` that a Mac puts between them, are passed over.
    """
    keys: list[bytes] = []
    pictures: list[_Place] = []
    captions: list[list[_Place]] = []
    try:
        with tarfile.open(path, "r:") as tar:  # no compression: what is compressed has no places
            members = (member for member in tar if member.isfile() and not is_hidden(member.name))
            for key, group in groupby(members, lambda member: split_name(member.name)[0]):
                # Only now: the members of a group are gone when the next one is asked for.
                found = [(split_name(member.name)[1], (member.offset_data, member.size)) for member in group]
                for picture, own_captions in _records(found, caption):
                    keys.append(key.encode(errors="surrogateescape"))
                    pictures.append(picture)
                    captions.append(own_captions)
        _require_end(path)
    except (tarfile.TarError, OSError) as error:
        raise CascadeError(
            f"{path}: not a whole, uncompressed tar file ({error}); unpack .tar.gz to .tar, or download it again"
        ) from None
    return {
        "pictures": _places(pictures),
        "captions": _places(chain.from_iterable(captions)),
        "caption_ends": _ends(captions),
        "keys": torch.tensor(list(b"".join(keys)), dtype=torch.uint8),
        "key_ends": _ends(keys),
    }


def _records(members: Sequence[tuple[str, _Place]], caption: str) -> list[tuple[_Place, list[_Place]]]:
    """(picture, captions) of the members of one key, given as (ending, place): as a rule one record.

    Several captions of one picture are variants. A key that stands twice, pictures too, is as many records; captions
    go to them in their order, or all of them to each where they are not as many.
    """
    first = next((ending for ending, _ in members if f".{ending}" in PICTURE_SUFFIXES), None)
    pictures = [place for ending, place in members if ending == first] or [_NOWHERE]
    captions = [place for ending, place in members if ending == caption]
    if len(pictures) > 1 and len(captions) == len(pictures):
        return [(picture, [own]) for picture, own in zip(pictures, captions, strict=True)]
    return [(picture, captions) for picture in pictures]


def _places(places: Iterable[_Place]) -> Tensor:
    return torch.tensor(list(places), dtype=torch.int64).reshape(-1, 2)


def _ends(parts: Sequence[Sized]) -> Tensor:
    """Where each of several parts ends when they stand one after the other."""
    return torch.tensor(list(accumulate(map(len, parts))), dtype=torch.int64)


def _part(joined: Tensor, ends: Tensor, index: int) -> Tensor:
    return joined[int(ends[index - 1]) if index else 0 : int(ends[index])]


def _require_end(path: Path) -> None:
    """The library takes a torn header for the end; a whole tar ends with a block of zeros."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        if file.read() != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def split_name(name: str) -> tuple[str, str]:
    """`folder/0001.seg.png` -> (`folder/0001`, `seg.png`)."""
    path = PurePosixPath(name)
    stem, _, ending = path.name.partition(".")
    return str(path.parent / stem), ending.lower()
