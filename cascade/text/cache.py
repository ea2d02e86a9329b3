"""Text embeddings on disk, so that T5 runs once per caption and need not stay in memory.

A cache is a folder: `index.json` names the encoder and lists the shards; each shard is one safetensors file with the
embeddings of some thousand captions, back to back, and the captions' hashes. A shard lists its own captions, so adding
one rewrites nothing, and an interrupted fill loses at most the current shard. Several processes may write, each its own
shards; the index is changed under a lock. A process whose share of the captions is complete leaves the file
`complete-0-of-1`: its number and the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.config.data import FORMAT_VERSION, check_format
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import read_json, write_json, write_text, writing
from cascade.files.locks import lock_file
from cascade.files.paths import path_of
from cascade.files.tensors import save_tensors
from cascade.files.text import open_regular
from cascade.settings import Noted, parse
from cascade.text.language import well_formed

# --- lookup ----------------------------------------------------------------------------------------------------------
# Locations of many millions of prompts, found by hash: 36 bytes per prompt instead of a dictionary's 400.

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


# --- cache -----------------------------------------------------------------------------------------------------------

_START_AGAIN = "delete the folder and fill it again with `cascade encode`"
ANOTHER_ENCODER = (
    "these embeddings were made by another text encoder, or with another max_length or dtype;"
    " use another folder, or delete this one and fill it again with `cascade encode`"
)


class _Noted(Noted):
    """What is read of an index.json."""

    encoder: str
    dim: int = Field(ge=1, le=1 << 20)
    shards: tuple[Annotated[str, Field(pattern=r"^shard-\d{1,9}-\d{5,9}\.safetensors$")], ...]
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Index:
    """The content of index.json: the encoder of the embeddings, their width, and the shard files."""

    encoder: str
    dim: int
    shards: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        data = read_json(path)
        check_format(path, data.pop("format", None))
        try:
            said = parse(_Noted, data, str(path))
        except CascadeError as error:
            raise CascadeError(f"{error}; {_START_AGAIN}") from None
        return cls(said.encoder, said.dim, said.shards, said.settings)

    def write(self, path: Path) -> None:
        write_json(path, {"format": FORMAT_VERSION, **asdict(self)})


class EmbeddingCache:
    """Unpadded bf16 embeddings of distinct prompts, found by the prompt's SHA-256 and read by memory map.

    Any number of processes may read a cache; each reads the shards that existed when it opened the cache, and its own.
    """

    def __init__(self, folder: str | Path, encoder_fingerprint: str, dim: int) -> None:
        """Open the cache in `folder`; the first `add` creates it if there is none.

        Raises CascadeError when the cache belongs to another encoder, or a shard is missing or damaged.
        """
        self.folder = path_of(folder)
        self._index = _Index(encoder_fingerprint, dim)
        self._shards: list[Tensor] = []  # memory-mapped, in the numbering of the lookup
        self._paths: list[Path] = []
        self._lookup = Lookup()
        if self._index_path.exists():
            found = _Index.read(self._index_path)
            if (found.encoder, found.dim) != (encoder_fingerprint, dim):
                raise CascadeError(f"{self.folder}: {ANOTHER_ENCODER}")
            self._index = found
            self._attach(found.shards)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """An existing cache of any encoder: for reading it without loading that encoder."""
        index = _Index.read(path_of(folder) / "index.json")
        return cls(folder, index.encoder, index.dim)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder that made these embeddings."""
        return self._index.encoder

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._index.dim

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the encoder, if recorded: a caller with equal settings need not load it."""
        return self._index.settings

    def note_settings(self, settings: dict[str, Any]) -> None:
        """Record the settings with which the encoder was loaded."""
        self._change_index(settings=settings)

    def note_incomplete(self, process: int, processes: int) -> None:
        """Mark the share of process number `process` of `processes` as incomplete while it fills."""
        others = {f"complete-{number}-of-{processes}" for number in range(processes) if number != process}
        for path in self.folder.glob("complete-*"):
            if path.name not in others:
                path.unlink(missing_ok=True)

    def note_complete(self, process: int, processes: int) -> None:
        """Mark the share of process number `process` of `processes` as complete."""
        write_text(self.folder / f"complete-{process}-of-{processes}", "")

    @property
    def bytes_per_caption(self) -> float:
        """Mean bytes on disk per caption, hashes and headers included; 0 when empty."""
        return sum(path.stat().st_size for path in self._paths) / max(1, len(self))

    def __contains__(self, prompt: str) -> bool:
        return self._lookup.find(hash_of(prompt)) is not None

    def __len__(self) -> int:
        return len(self._lookup)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts without an embedding, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def add(self, prompts: Sequence[str], rows: Sequence[Tensor], process: int = 0) -> None:
        """Write one shard with the missing ones of `prompts`; rows: the embeddings of `prompts`, each (n, D).

        process: number of the writing process, part of the shard's name.
        """
        fresh = {hash_of(prompt): row for prompt, row in zip(prompts, rows, strict=True) if prompt not in self}
        if not fresh:
            return
        tensors = {
            "tokens": torch.cat([row.to("cpu", torch.bfloat16) for row in fresh.values()]),
            "lengths": torch.tensor([len(row) for row in fresh.values()], dtype=torch.int32),
            "keys": torch.frombuffer(bytearray(b"".join(fresh)), dtype=torch.uint8).reshape(len(fresh), HASH_BYTES),
        }
        own = f"shard-{process}-"
        name = f"{own}{sum(shard.startswith(own) for shard in self._index_now().shards):05d}.safetensors"
        # The shard first: one that a crash leaves out of the index is replaced by the next shard of that name.
        save_tensors(self.folder / name, tensors)
        self._change_index(add=name)
        self._attach([name])

    @contextmanager
    def alone(self, process: int) -> Iterator[None]:
        """Lock for writing as process number `process`. Raises CascadeError when another process holds that number."""
        try:
            with lock_file(self.folder / f".writer-{process}", wait=False):
                yield
        except BlockingIOError:
            raise CascadeError(
                f"{self.folder}: another process is filling it; wait for its end, or use another folder"
            ) from None

    def get(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The embeddings of `prompts`: (B, N, D) bf16. Raises CascadeError if one is missing."""
        return TextEmbeddings.from_rows([self._row(prompt) for prompt in prompts])

    def find(self, prompts: Sequence[str]) -> TextEmbeddings | None:
        """The embeddings of `prompts`; None if one is missing."""
        places = [self._lookup.find(hash_of(prompt)) for prompt in prompts]
        known = [place for place in places if place is not None]
        return TextEmbeddings.from_rows([self._tokens(place) for place in known]) if len(known) == len(places) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the arguments to open it: another process maps the files itself."""
        return type(self), (self.folder, self.fingerprint, self.dim)

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.json"

    def _index_now(self) -> _Index:
        """The current index on disk, which other processes may have changed."""
        return _Index.read(self._index_path) if self._index_path.exists() else self._index

    def _change_index(self, add: str | None = None, settings: dict[str, Any] | None = None) -> None:
        """Add a shard or settings to the current index on disk, under a lock."""
        with writing(self.folder), lock_file(self.folder / ".lock"):
            now = self._index_now()
            shards = now.shards if add is None else (*now.shards, add)
            self._index = replace(now, shards=shards, settings=settings or now.settings)
            self._index.write(self._index_path)

    def _attach(self, names: Sequence[str]) -> None:
        """Open shards and add their captions to the lookup."""
        found = []
        for name in names:
            path = self.folder / name
            try:
                open_regular(path).close()  # of a pipe the library would wait for more
                shard: Any = safe_open(path, framework="pt")
                keys, lengths = shard.get_tensor("keys"), shard.get_tensor("lengths")
                shape = shard.get_slice("tokens").get_shape()
            except FileNotFoundError:
                raise CascadeError(f"{path}: no such file, although the index lists it; {_START_AGAIN}") from None
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CascadeError(f"{path}: damaged ({error}); {_START_AGAIN}") from None
            if len(keys) != len(lengths) or shape != [int(lengths.sum()), self.dim]:
                raise CascadeError(f"{path}: its tensors do not fit together; {_START_AGAIN}")
            found.append((keys, lengths))
            self._shards.append(shard.get_tensor("tokens"))
            self._paths.append(path)
        self._lookup.add_shards(found)

    def _row(self, prompt: str) -> Tensor:
        place = self._lookup.find(hash_of(prompt))
        if place is None:
            raise CascadeError(f"{self.folder}: no embedding of {quoted(prompt)}; add it with `cascade encode`")
        return self._tokens(place)

    def _tokens(self, place: Place) -> Tensor:
        return self._shards[place.shard][place.start : place.start + place.length]
