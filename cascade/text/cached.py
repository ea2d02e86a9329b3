"""A text encoder with a cache of its embeddings, and the filling of that cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Self

import torch
from torch import Tensor

from cascade.conditioning import NULL_TEXT, TextEmbeddings, TextEncoderProtocol
from cascade.errors import CascadeError
from cascade.text.cache import ANOTHER_ENCODER, EmbeddingCache, hash_of

_SLICE = 16  # batches encoded and rounded at a time while a cache is filled


class CachedTextEncoder:
    """A text encoder that reads a cache first and loads the real encoder only for a missing prompt.

    Every embedding is rounded to bf16, as in the cache, so that cached and uncached captions give equal results.
    Captions encoded on the fly are not added to the cache; `fill` adds captions, and accepts this encoder too.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        load: Callable[[], TextEncoderProtocol],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """load: returns the encoder of the cache. device, dtype: of the returned embeddings."""
        self._cache = cache
        self._load = load
        self._encoder: TextEncoderProtocol | None = None
        self._device = device
        self._dtype = dtype

    @property
    def cache(self) -> EmbeddingCache:
        """The cache that is read first."""
        return self._cache

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._cache.dim

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder that made the cache."""
        return self._cache.fingerprint

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:
        """The embeddings of `prompts`: (B, N, D) with N the longest, and their mask."""
        missing = self._cache.missing(prompts)
        fresh: dict[str, Tensor] = {}
        if missing:
            rows = self._real_encoder().encode(missing, batch_size).to("cpu", torch.bfloat16).rows()
            fresh = dict(zip(missing, rows, strict=True))
        found = [prompt for prompt in dict.fromkeys(prompts) if prompt not in fresh]
        if found:
            fresh.update(zip(found, self._cache.get(found).rows(), strict=True))
        return TextEmbeddings.from_rows([fresh[prompt] for prompt in prompts]).to(self._device, self._dtype)

    def to(self, device: torch.device | str | None = None) -> Self:
        """Return embeddings on `device` from now on, and move the real encoder there, now or when it is loaded."""
        self._device = self._device if device is None else device
        if self._encoder is not None:
            self._encoder.to(self._device)
        return self

    def release(self) -> None:
        """Free the real encoder's weights. A prompt that is not cached loads it again."""
        if self._encoder is not None:
            self._encoder.release()
            self._encoder = None

    def _real_encoder(self) -> TextEncoderProtocol:
        if self._encoder is None:
            encoder = self._load()
            _check_same(self._cache, encoder)
            self._encoder = encoder.to(self._device)
        return self._encoder


@dataclass(frozen=True)
class Pace:
    """Batch and shard sizes of `fill`, and its early end.

    batch_size: captions encoded at once. shard_size: captions per shard, the most that a kill can lose. stopped:
    whether to end early, after the current batches; the embeddings made until then are written.
    """

    batch_size: int = 1
    shard_size: int = 4096
    stopped: Callable[[], bool] = lambda: False


def fill(
    cache: EmbeddingCache,
    encoder: TextEncoderProtocol,
    captions: Iterable[str],
    pace: Pace = Pace(),
    share: tuple[int, int] = (0, 1),
) -> int:
    """Encode the captions that the cache lacks, and the null text; returns their number.

    captions: may be a stream; at most one shard's embeddings are in memory. share: (number of this process, number of
    processes); each process reads all captions and encodes its share.
    """
    _check_same(cache, encoder)
    process, processes = share
    going = takewhile(lambda _: not pace.stopped(), captions)
    ours = (caption for caption in chain([NULL_TEXT], going) if _owner(caption, processes) == process)
    added = 0
    with cache.alone(process):
        cache.note_incomplete(process, processes)
        for shard in _shards_of_missing(cache, ours, pace.shard_size):
            rows = list(_rows(encoder, shard, pace.batch_size, pace.stopped))
            cache.add(shard[: len(rows)], rows, process)
            added += len(rows)
        if not pace.stopped():
            cache.note_complete(process, processes)
    return added


def _rows(
    encoder: TextEncoderProtocol, captions: Sequence[str], batch_size: int, stopped: Callable[[], bool]
) -> Iterator[Tensor]:
    """Embeddings of the captions, in bf16, until `stopped`.

    Encoded in slices: `encode` pads to the longest caption, and a padded shard is many times the size of its rows.
    """
    for start in range(0, len(captions), _SLICE * batch_size):
        if stopped():
            return
        embeddings = encoder.encode(captions[start : start + _SLICE * batch_size], batch_size)
        yield from embeddings.to("cpu", torch.bfloat16).rows()


def _owner(caption: str, processes: int) -> int:
    """The process that encodes a caption, decided by its hash and so independent of order."""
    return int.from_bytes(hash_of(caption)[:8]) % processes


def _shards_of_missing(cache: EmbeddingCache, captions: Iterable[str], shard_size: int) -> Iterator[list[str]]:
    """The missing captions, each once, in lists of `shard_size`; the caller fills the cache in between."""
    waiting: dict[str, None] = {}
    for caption in captions:
        if caption not in cache:
            waiting[caption] = None
        if len(waiting) == shard_size:
            yield list(waiting)
            waiting.clear()
    if waiting:
        yield list(waiting)


def _check_same(cache: EmbeddingCache, encoder: TextEncoderProtocol) -> None:
    if encoder.fingerprint != cache.fingerprint:
        raise CascadeError(f"{cache.folder}: {ANOTHER_ENCODER}")
