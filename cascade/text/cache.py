"""Text embeddings on disk, so that T5 runs once per caption and need not stay in memory.

A cache is a folder: `index.json` says whose embeddings it holds and lists the shards; each shard is one
safetensors file with the embeddings of some thousand captions, back to back, and the captions' hashes. Since
a shard says itself what it holds, one more caption rewrites nothing, and whatever interrupts a fill loses at
most the shard at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from cascade.checkpoint import check_format, read_json, save_tensors, write_json
from cascade.conditioning import NULL_TEXT
from cascade.config import FORMAT_VERSION
from cascade.errors import CascadeError
from cascade.text.t5 import TextEmbeddings, TextEncoderProtocol, well_formed

_SLICE = 16  # batches encoded and rounded at a time while a cache is filled
_START_AGAIN = "delete the folder and fill it again with `cascade encode`"
_ANOTHER_ENCODER = (
    "these embeddings were made by another text encoder, or with another max_length or dtype;"
    " give this one a folder of its own, or delete this folder and fill it again with `cascade encode`"
)


@dataclass(frozen=True)
class _Place:
    """Where an embedding lies: tokens `start` to `start + length` of a shard."""

    shard: int
    start: int
    length: int


@dataclass(frozen=True)
class _Index:
    """What index.json says: whose embeddings these are, how wide, and in which files."""

    encoder: str
    dim: int
    shards: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        data = read_json(path)
        check_format(path, data.pop("format", None))
        try:
            return cls(str(data["encoder"]), int(data["dim"]), tuple(data["shards"]), data.get("settings"))
        except (KeyError, TypeError, ValueError):
            raise CascadeError(f"{path}: damaged; {_START_AGAIN}") from None

    def write(self, path: Path) -> None:
        write_json(path, {"format": FORMAT_VERSION, **asdict(self)})


class EmbeddingCache:
    """Unpadded bf16 embeddings of distinct prompts, found by the prompt's SHA-256 and read by memory map.

    One process may fill a cache; any number may read it, each seeing the shards there were when it opened it.
    """

    def __init__(self, folder: str | Path, encoder_fingerprint: str, dim: int) -> None:
        """Open the cache in `folder`, or begin one there with the first `add`.

        Raises CascadeError when another encoder made it, or a shard is missing or damaged.
        """
        self.folder = Path(folder)
        self._index = _Index(encoder_fingerprint, dim)
        self._shards: list[Any] = []  # open safetensors files, in the order of the index
        self._places: dict[bytes, _Place] = {}
        if self._index_path.exists():
            found = _Index.read(self._index_path)
            if (found.encoder, found.dim) != (encoder_fingerprint, dim):
                raise CascadeError(f"{self.folder}: {_ANOTHER_ENCODER}")
            self._index = found
            for name in found.shards:
                self._attach(name)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """An existing cache, whichever encoder made it: for reading it without loading that encoder."""
        index = _Index.read(Path(folder) / "index.json")
        return cls(folder, index.encoder, index.dim)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder whose embeddings these are."""
        return self._index.encoder

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._index.dim

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings by which the encoder was loaded, if they were noted: whoever has the same need not load it."""
        return self._index.settings

    def note_settings(self, settings: dict[str, Any]) -> None:
        """Write down the settings by which the encoder was loaded."""
        self._index = replace(self._index, settings=settings)
        self._index.write(self._index_path)

    @property
    def bytes_per_caption(self) -> float:
        """Mean bytes on disk that a caption takes, its share of hashes and headers included; 0 when empty."""
        total = sum((self.folder / name).stat().st_size for name in self._index.shards)
        return total / max(1, len(self))

    def __contains__(self, prompt: str) -> bool:
        return _key(prompt) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that are not here, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def add(self, prompts: Sequence[str], rows: Sequence[Tensor]) -> None:
        """Write one shard with those of `prompts` that are not here; rows: their embeddings, (n, D)."""
        fresh = {_key(prompt): row for prompt, row in zip(prompts, rows, strict=True) if prompt not in self}
        if not fresh:
            return
        name = f"shard-{len(self._shards):05d}.safetensors"
        tensors = {
            "tokens": torch.cat([row.to("cpu", torch.bfloat16) for row in fresh.values()]),
            "lengths": torch.tensor([len(row) for row in fresh.values()], dtype=torch.int32),
            "keys": torch.frombuffer(bytearray(b"".join(fresh)), dtype=torch.uint8).reshape(len(fresh), -1),
        }
        # The shard first: what a crash leaves outside the index is replaced by the next shard of that number.
        save_tensors(self.folder / name, tensors)
        index = replace(self._index, shards=(*self._index.shards, name))
        index.write(self._index_path)
        self._index = index
        self._attach(name)

    def get(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The embeddings of `prompts`: (B, N, D) bf16. Raises CascadeError if one is missing."""
        return TextEmbeddings.from_rows([self._row(prompt) for prompt in prompts])

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.json"

    def _attach(self, name: str) -> None:
        """Open a shard and learn which captions it holds."""
        try:
            shard: Any = safe_open(self.folder / name, framework="pt")
            keys, lengths = shard.get_tensor("keys").numpy(), shard.get_tensor("lengths").tolist()
            shape = shard.get_slice("tokens").get_shape()
        except FileNotFoundError:
            raise CascadeError(f"{self.folder / name}: no such file, but the index lists it; {_START_AGAIN}") from None
        except (SafetensorError, OSError) as error:
            raise CascadeError(f"{self.folder / name}: damaged ({error}); {_START_AGAIN}") from None
        if len(keys) != len(lengths) or shape != [sum(lengths), self.dim]:
            raise CascadeError(f"{self.folder / name}: its parts do not fit together; {_START_AGAIN}")
        starts = accumulate(lengths, initial=0)
        for key, start, length in zip(keys, starts, lengths, strict=False):
            self._places[key.tobytes()] = _Place(len(self._shards), start, length)
        self._shards.append(shard)

    def _row(self, prompt: str) -> Tensor:
        place = self._places.get(_key(prompt))
        if place is None:
            raise CascadeError(f"{self.folder}: no embedding of {prompt!r}; add it with `cascade encode`")
        tokens: Tensor = self._shards[place.shard].get_slice("tokens")[place.start : place.start + place.length]
        return tokens


class CachedTextEncoder:
    """A text encoder that looks into a cache first, and loads the real one only when a prompt is not there.

    Every embedding is rounded to bf16, as the cache stores it: whether a caption was cached changes nothing.
    Captions encoded on the fly do not grow the cache; `fill` does, and takes this encoder like the real one.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        load: Callable[[], TextEncoderProtocol],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """load: gives the encoder that made the cache, or will. device, dtype: of the embeddings returned."""
        self._cache = cache
        self._load = load
        self._encoder: TextEncoderProtocol | None = None
        self._device = device
        self._dtype = dtype

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
        """Move the embeddings returned to `device`, and the real encoder, now or when it is loaded."""
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


def fill(
    cache: EmbeddingCache,
    encoder: TextEncoderProtocol,
    captions: Iterable[str],
    batch_size: int = 1,
    shard_size: int = 4096,
    progress: bool = False,
) -> int:
    """Encode the captions that the cache lacks, and the null text; returns how many there were.

    captions: may be a stream; no more than one shard's embeddings are in memory. batch_size: captions encoded
    at once. shard_size: captions in a shard, which is what an interruption can lose. progress: show a bar.
    """
    _check_same(cache, encoder)
    bar = tqdm(captions, desc="captions", unit="caption", disable=not progress)
    added = 0
    for shard in _shards_of_missing(cache, chain([NULL_TEXT], bar), shard_size):
        rows: list[Tensor] = []
        for start in range(0, len(shard), _SLICE * batch_size):
            # In slices: `encode` pads to the longest, and a whole shard padded is many times its bf16 rows.
            embeddings = encoder.encode(shard[start : start + _SLICE * batch_size], batch_size)
            rows += embeddings.to("cpu", torch.bfloat16).rows()
        cache.add(shard, rows)
        added += len(shard)
    return added


def _shards_of_missing(cache: EmbeddingCache, captions: Iterable[str], shard_size: int) -> Iterator[list[str]]:
    """The captions that are missing, each once, in lists of `shard_size`; the cache grows in between."""
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
        raise CascadeError(f"{cache.folder}: {_ANOTHER_ENCODER}")


def _key(prompt: str) -> bytes:
    return hashlib.sha256(well_formed(prompt).encode()).digest()
