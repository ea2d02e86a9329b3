"""Text embeddings on disk, so that T5 runs once per caption and need not stay in memory.

A cache is a folder: `index.json` says whose embeddings it holds and lists the shards; each shard is one
safetensors file with the embeddings of some thousand captions, back to back, and the captions' hashes. Since
a shard says itself what it holds, one more caption rewrites nothing, and whatever kills a fill loses at most the
shard at hand. Several processes may write, each its own shards; the index changes under a lock. A process whose share
of the captions is all there leaves the file `complete-0-of-1`: its number, and of how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.checkpoint import check_format, read_json, save_tensors, write_json, write_text, writing
from cascade.config.common import FORMAT_VERSION
from cascade.errors import CascadeError
from cascade.files.paths import path_of
from cascade.locks import lock_file
from cascade.quoting import quoted
from cascade.text.embeddings import TextEmbeddings
from cascade.text.lookup import HASH_BYTES, Lookup, Place, hash_of

_START_AGAIN = "delete the folder and fill it again with `cascade encode`"
ANOTHER_ENCODER = (
    "these embeddings were made by another text encoder, or with another max_length or dtype;"
    " give this one a folder of its own, or delete this folder and fill it again with `cascade encode`"
)


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

    Any number of processes may read a cache, each seeing the shards there were when it opened it, and its own.
    """

    def __init__(self, folder: str | Path, encoder_fingerprint: str, dim: int) -> None:
        """Open the cache in `folder`, or begin one there with the first `add`.

        Raises CascadeError when another encoder made it, or a shard is missing or damaged.
        """
        self.folder = path_of(folder)
        self._index = _Index(encoder_fingerprint, dim)
        self._shards: list[Tensor] = []  # mapped into memory, not read; as the lookup numbers them
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
        """An existing cache, whichever encoder made it: for reading it without loading that encoder."""
        index = _Index.read(path_of(folder) / "index.json")
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
        self._change_index(settings=settings)

    def note_incomplete(self, process: int, processes: int) -> None:
        """Process number `process` of `processes` begins to fill: what was said of its share before holds no longer."""
        others = {f"complete-{number}-of-{processes}" for number in range(processes) if number != process}
        for path in self.folder.glob("complete-*"):
            if path.name not in others:
                path.unlink(missing_ok=True)

    def note_complete(self, process: int, processes: int) -> None:
        """The share of process number `process` of `processes` is all there."""
        write_text(self.folder / f"complete-{process}-of-{processes}", "")

    @property
    def bytes_per_caption(self) -> float:
        """Mean bytes on disk that a caption takes, its share of hashes and headers included; 0 when empty."""
        return sum(path.stat().st_size for path in self._paths) / max(1, len(self))

    def __contains__(self, prompt: str) -> bool:
        return self._lookup.find(hash_of(prompt)) is not None

    def __len__(self) -> int:
        return len(self._lookup)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that are not here, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def add(self, prompts: Sequence[str], rows: Sequence[Tensor], process: int = 0) -> None:
        """Write one shard with those of `prompts` that are not here; rows: their embeddings, (n, D).

        process: which of the processes we are that write at once; it names the shard.
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
        # The shard first: what a crash leaves outside the index is replaced by the next shard of that name.
        save_tensors(self.folder / name, tensors)
        self._change_index(add=name)
        self._attach([name])

    @contextmanager
    def alone(self, process: int) -> Iterator[None]:
        """While we write as process number `process`. Raises CascadeError when another writes under that number."""
        try:
            with lock_file(self.folder / f".writer-{process}", wait=False):
                yield
        except BlockingIOError:
            raise CascadeError(f"{self.folder}: is being filled already; wait for it, or use another folder") from None

    def get(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The embeddings of `prompts`: (B, N, D) bf16. Raises CascadeError if one is missing."""
        return TextEmbeddings.from_rows([self._row(prompt) for prompt in prompts])

    def find(self, prompts: Sequence[str]) -> TextEmbeddings | None:
        """The embeddings of `prompts`; None if one is missing."""
        places = [self._lookup.find(hash_of(prompt)) for prompt in prompts]
        known = [place for place in places if place is not None]
        return TextEmbeddings.from_rows([self._tokens(place) for place in known]) if len(known) == len(places) else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew: files do not travel."""
        return type(self), (self.folder, self.fingerprint, self.dim)

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.json"

    def _index_now(self) -> _Index:
        """The index on disk, which other processes may have changed since we read it."""
        return _Index.read(self._index_path) if self._index_path.exists() else self._index

    def _change_index(self, add: str | None = None, settings: dict[str, Any] | None = None) -> None:
        """Add a shard or note settings in the index as it is now, which other processes change, too."""
        with writing(self.folder), lock_file(self.folder / ".lock"):
            now = self._index_now()
            shards = now.shards if add is None else (*now.shards, add)
            self._index = replace(now, shards=shards, settings=settings or now.settings)
            self._index.write(self._index_path)

    def _attach(self, names: Sequence[str]) -> None:
        """Open shards and learn which captions they hold."""
        found = []
        for name in names:
            path = self.folder / name
            try:
                shard: Any = safe_open(path, framework="pt")
                keys, lengths = shard.get_tensor("keys"), shard.get_tensor("lengths")
                shape = shard.get_slice("tokens").get_shape()
            except FileNotFoundError:
                raise CascadeError(f"{path}: no such file, but the index lists it; {_START_AGAIN}") from None
            except (SafetensorError, OSError) as error:
                raise CascadeError(f"{path}: damaged ({error}); {_START_AGAIN}") from None
            if len(keys) != len(lengths) or shape != [int(lengths.sum()), self.dim]:
                raise CascadeError(f"{path}: its parts do not fit together; {_START_AGAIN}")
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
