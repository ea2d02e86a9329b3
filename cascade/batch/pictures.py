"""Finished pictures: files in a store, each with a line in the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade.batch.layout import Layout
from cascade.batch.manifest import Manifest, made_by
from cascade.batch.metadata import FORMATS, encode, sidecar
from cascade.batch.plan import Target
from cascade.batch.stores import Store, sha256
from cascade.drawing.task import Drawn
from cascade.errors import CascadeError

_OF_THE_FILE = ("file", "stages", "stages_sha256", "sha256", "seconds")


@dataclass(frozen=True)
class Finished:
    """A picture to write. entry: the part of its manifest line about how it was drawn."""

    target: Target
    drawn: Drawn
    entry: Mapping[str, Any]


class Pictures:
    """The pictures in a folder. A picture counts as finished when its file and its manifest line are complete."""

    def __init__(self, folder: Path, layout: Layout, store: Store, manifest: Manifest) -> None:
        """folder: the folder's name in messages."""
        self._folder, self._layout, self._store, self._manifest = folder, layout, store, manifest

    def has(self, target: Target) -> bool:
        """Whether a picture is finished and complete. Raises CascadeError when another one has its place."""
        index = target.job.record.index
        known = self._manifest.find(index, target.number)
        if known is None:
            return False
        if made_by(known) != (target.recipe.digest(), target.job.num_images):
            raise CascadeError(
                f"{self._folder}: {known['file']} was drawn from another prompt, seed or settings than prompt {index}"
                " of this run; name another folder with --out, or --overwrite"
            )
        if not all(self._is(*kept) for kept in _kept(known)):
            return False
        return all(self._read(name) == text for name, text in self._companions(known).items())

    def _is(self, name: str, digest: str | None) -> bool:
        """Whether a file is there and is what was written; earlier versions noted no digest of smaller pictures."""
        content = self._read(name)
        return content is not None and digest in (None, sha256(content))

    def _read(self, name: str) -> bytes | None:
        """A file; None where it is not there or the disk fails to read it: it is drawn again."""
        try:
            return self._store.read(name)
        except OSError:
            return None

    def write(self, finished: Finished) -> dict[str, Any]:
        """Write a picture in full, then its manifest line, which is returned. Raises OSError, CascadeError."""
        target, entry, ending = finished.target, finished.entry, FORMATS[self._layout.picture_format]
        index, count = target.job.record.index, target.job.num_images
        files: dict[str, bytes] = {}
        kept: dict[str, str] = {}
        *smaller, image = finished.drawn.pixels
        drawn, finish = target.job.slots[-1].config.pictures, self._layout.finish
        form, plain = finish.result(drawn), replace(finish, palette=None, scale=1)
        for slot, picture in zip(target.job.slots, smaller, strict=False):
            name = self._stage_name(index, target.stem, slot.config.resolution, ending, count)
            kept[str(slot.config.resolution)] = name
            files[name] = encode(plain(picture, drawn), form, entry, self._layout.picture_format)[0]
        file = self._store.name(index, target.stem, ending, count)
        content, separate = encode(finish(image, drawn), form, entry, self._layout.picture_format)
        if separate is not None:
            files[sidecar(file)] = separate
        files |= self._companions({**entry, "file": file})
        files[file] = content  # last: if it exists, the others do
        self._store.write(files)
        digests = {size: sha256(files[name]) for size, name in kept.items()}
        stages = {"stages": kept, "stages_sha256": digests} if kept else {}
        seconds = round(finished.drawn.seconds, 3)
        line = {**entry, "file": file, **stages, "sha256": sha256(content), "seconds": seconds}
        self._manifest.append(line)
        return line

    def _companions(self, line: Mapping[str, Any]) -> dict[str, bytes]:
        """The files next to a picture in a tar: its manifest line without times and names, and its prompt."""
        if not self._layout.in_tars:
            return {}
        stem = str(line["file"]).rpartition(".")[0]
        entry = {name: value for name, value in line.items() if name not in _OF_THE_FILE}
        return {f"{stem}.json": json.dumps(entry).encode(), f"{stem}.txt": line["prompt"].encode()}

    def _stage_name(self, index: int, stem: str, resolution: int, ending: str, count: int) -> str:
        if self._layout.in_tars:
            return self._store.name(index, stem, f"{resolution}.{ending}", count)
        return "stages/" + self._store.name(index, f"{stem}-{resolution}", ending, count)


def _kept(line: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """(file, SHA-256) of a picture and of its smaller ones."""
    yield line["file"], line["sha256"]
    for size, name in line.get("stages", {}).items():
        yield name, line.get("stages_sha256", {}).get(size)
