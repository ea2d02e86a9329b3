"""Locations of many millions of prompts, found by hash: 36 bytes per prompt instead of a dictionary's 400."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cascade.text.captions import well_formed

HASH_BYTES = 32


def hash_of(prompt: str) -> bytes:
    """SHA-256 of a prompt."""
    return hashlib.sha256(well_formed(prompt).encode()).digest()


@dataclass(frozen=True)
class Place:
    """Location of an embedding: tokens `start` to `start + length` of a shard."""

    shard: int
    start: int
    length: int


class Lookup:
    """A map from a prompt's hash to its place.

    Sorted by the first 8 bytes of the hashes; the other bytes are compared in the shards' memory maps.
    """

    def __init__(self) -> None:
        self._hashes: list[npt.NDArray[np.uint8]] = []
        self._prefixes = np.empty(0, dtype=np.uint64)
        self._shards = np.empty(0, dtype=np.int32)
        self._rows = np.empty(0, dtype=np.int32)
        self._starts = np.empty(0, dtype=np.int64)
        self._lengths = np.empty(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._prefixes)

    def add_shards(self, shards: list[tuple[Tensor, Tensor]]) -> None:
        """Add the prompts of further shards, each given as hashes, uint8 (n, 32), and lengths, int32 (n,), in order."""
        first = len(self._hashes)
        hashes = [shard.numpy() for shard, _ in shards]
        lengths = [length.numpy() for _, length in shards]
        self._hashes += hashes
        columns: dict[str, list[npt.NDArray[Any]]] = {
            "_prefixes": [_prefixes(shard) for shard in hashes],
            "_shards": [np.full(len(shard), first + number, np.int32) for number, shard in enumerate(hashes)],
            "_rows": [np.arange(len(shard), dtype=np.int32) for shard in hashes],
            "_starts": [np.cumsum(length, dtype=np.int64) - length for length in lengths],
            "_lengths": lengths,
        }
        joined = {name: np.concatenate([getattr(self, name), *parts]) for name, parts in columns.items()}
        order = np.argsort(joined["_prefixes"], kind="stable")  # nearly sorted when a shard is added to many
        for name, values in joined.items():
            setattr(self, name, values[order])

    def find(self, key: bytes) -> Place | None:
        """The place of the prompt with this hash, None when it is missing."""
        prefix = _prefixes(np.frombuffer(key, np.uint8)[None])
        first, last = (int(np.searchsorted(self._prefixes, prefix, side)[0]) for side in ("left", "right"))
        for index in range(first, last):
            shard = int(self._shards[index])
            if self._hashes[shard][self._rows[index]].tobytes() == key:
                return Place(shard, int(self._starts[index]), int(self._lengths[index]))
        return None


def _prefixes(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each hash (n, 32) as a number: (n,)."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8").astype(np.uint64)[:, 0]
