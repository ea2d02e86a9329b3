"""The gallery: a batch folder in which the server has its own manifest, next to those of the command line."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.batch.folder import Layout
from cascade.batch.manifest import Manifest
from cascade.batch.metadata import sidecar
from cascade.batch.stores import Finished, FolderStore, Pictures, TarStore, place
from cascade.batch.team import RunLock
from cascade.errors import CascadeError, StorageError
from cascade.files.paths import is_within
from cascade.files.text import content_of, parse_json, read_json_file
from cascade.pictures.reading import open_picture, read_rgb
from cascade.server.catalogue import Catalogue, Row, Traces, picture_id, stored_in
from cascade.server.sources import Sources

PART = "studio"
"""Name of the server's subfolder of pictures, and part of the names of its manifest and lock."""
THUMBNAIL = 384
"""Longest side of a thumbnail, in pixels."""


class _Store(FolderStore):
    """Store in a separate subfolder, since a run of the command line may use the same file names."""

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:
        return f"{PART}/{super().name(index, stem, ending, num_images)}"


class Gallery:
    """The folder of existing and new pictures. The command line may draw into the same folder at the same time."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CascadeError when the folder cannot be written, or another gallery uses it."""
        self.folder, self.state = Path(folder), Path(folder) / ".cascade"
        self._trash, self._temporary = self.state / "trash", self.state / f"temporary-{PART}"
        try:
            for path in (self._trash, self._temporary):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.state / f"lock-{PART}")
            self._manifest = self._opened(self.folder / f"manifest-{PART}.jsonl")
        except OSError as error:
            raise self._unwritable(error) from None
        self.traces = Traces(self.state / "traces")
        self._store = _Store(self.folder, self._temporary)
        self._tars = TarStore(self.folder, self.state / "spool", self._temporary, 1)
        self._pictures = Pictures(self.folder, Layout(), self._store, self._manifest)
        self._catalogue = Catalogue(self.folder)
        self._stars = _read_stars(self.folder / f"{PART}.json")
        self._counting = threading.Lock()
        self._index = max((int(entry["index"]) for entry in self._manifest.entries()), default=-1)

    def close(self) -> None:
        """Release the folder and remove deleted pictures permanently."""
        shutil.rmtree(self._trash, ignore_errors=True)
        self._catalogue.close()
        self._manifest.close()
        self._lock.close()

    def next_index(self) -> int:
        """The index of the next prompt."""
        with self._counting:
            self._index += 1
            return self._index

    def sources(self) -> Sources:
        """Pictures uploaded for editing, stored in the gallery's folder."""
        return Sources(self.state / "sources", self._temporary, lambda id: self.read(id)[1])

    def write(self, finished: Finished) -> dict[str, Any]:
        """Store a picture; returns its entry. Raises CascadeError when it cannot be written."""
        try:
            line = self._pictures.write(finished)
        except OSError as error:
            raise self._unwritable(error) from None
        self._refresh()
        return self.get(picture_id(line))

    def page(self, search: str, starred: bool, before: str | None, most: int) -> dict[str, Any]:
        """Up to `most` pictures, newest first, and the number of all. before: see `Catalogue.rows`."""
        self._refresh()
        words = search.split()
        there = (row for row in self._catalogue.rows(words, starred, before) if self._is_there(row.file))
        return {
            "pictures": [self._entry(row) for row in islice(there, most)],
            "total": self._catalogue.count(words, starred),
        }

    def get(self, id: str) -> dict[str, Any]:
        """The entry of a picture. Raises KeyError."""
        return self._entry(self._row(id))

    def said(self, id: str) -> dict[str, Any]:
        """The picture's line of the manifest. Raises KeyError."""
        return self._row(id).entry

    def read(self, id: str) -> tuple[str, bytes]:
        """(file name, content) of a picture. Raises KeyError."""
        file = self._row(id).file
        content = self._content(file)
        if content is None:
            raise KeyError(id)
        return file.rpartition("/")[2], content

    def thumbnail(self, id: str) -> bytes:
        """A small WebP of a picture. Raises KeyError, CascadeError for a damaged picture."""
        name, content = self.read(id)
        small = read_rgb(io.BytesIO(content), name)
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="WEBP", quality=88, method=2)
        return buffer.getvalue()

    def star(self, id: str, starred: bool) -> dict[str, Any]:
        """Star or unstar a picture. Raises KeyError, CascadeError."""
        self._row(id)
        self._stars = {*self._stars, id} if starred else self._stars - {id}
        text = json.dumps({"stars": sorted(self._stars)}, indent=1)
        try:
            place(self.folder / f"{PART}.json", text.encode(), self._temporary)
        except OSError as error:
            raise self._unwritable(error) from None
        self._catalogue.star(id, starred)
        return self.get(id)

    def delete(self, id: str) -> None:
        """Delete a picture; `restore` can bring it back until `close`. Raises KeyError, CascadeError."""
        row = self._row(id)
        if row.file != stored_in(row.file):
            raise CascadeError(f"{row.file}: single pictures cannot be deleted from a tar")
        aside = self._trash / row.id
        aside.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(_files(row.entry)):
            if self._is_ours(name) and (self.folder / name).is_file():
                (self.folder / name).replace(aside / str(number))
        self._catalogue.hide(row.id, True)

    def restore(self, id: str) -> dict[str, Any]:
        """Restore a deleted picture. Raises KeyError."""
        row = self._row(id)
        for number, name in enumerate(_files(row.entry)):
            if (self._trash / row.id / str(number)).is_file():
                (self._trash / row.id / str(number)).replace(self.folder / name)
        self._catalogue.hide(row.id, False)
        return self.get(id)

    def _opened(self, path: Path) -> Manifest:
        """The server's manifest, without deleted pictures."""
        if path.exists():
            lines = [line for line in content_of(path).splitlines(keepends=True) if self._names_a_file(line)]
            place(path, b"".join(lines), self._temporary)
        manifest = Manifest(path)
        manifest.refresh()
        return manifest

    def _names_a_file(self, line: bytes) -> bool:
        try:
            return self._is_there(parse_json(line)["file"])
        except (ValueError, KeyError, TypeError):
            return False  # a truncated line after a kill

    def _refresh(self) -> None:
        """Read the pictures of other programs."""
        self._catalogue.refresh(self._stars)

    def _row(self, id: str) -> Row:
        row = self._catalogue.find(id)
        if row is None:
            raise KeyError(id)
        return row

    def _is_ours(self, file: str) -> bool:
        """Whether the file is in this folder; a manifest of unknown origin could name any path."""
        return is_within(self.folder / file, self.folder)

    def _is_there(self, file: str) -> bool:
        return self._is_ours(file) and (self.folder / stored_in(file)).is_file()

    def _content(self, file: str) -> bytes | None:
        if not self._is_there(file):
            return None
        return self._store.read(file) if file == stored_in(file) else self._tars.read(file)

    def _entry(self, row: Row) -> dict[str, Any]:
        """A row as JSON for the page; the seed is text, because JavaScript would round it."""
        height, width = self._size(row)
        same = ("prompt", "negative_prompt", "number", "num_images", "model", "license", "seconds")
        return {
            "id": row.id,
            "name": row.file.rpartition("/")[2],
            "drawn_at": row.drawn,
            "seed": str(row.entry["seed"]),
            **{name: row.entry.get(name) for name in same},
            "height": height,
            "width": width,
            "stages": row.entry["settings"]["stages"],
            "starred": row.id in self._stars,
            "deletable": row.file == stored_in(row.file),
        }

    def _size(self, row: Row) -> tuple[int, int]:
        """Height and width; for an edit with a mask, the file's, which the manifest lacks."""
        settings = row.entry["settings"]
        if row.entry.get("mask") and row.file == stored_in(row.file):
            with suppress(OSError, ValueError), open_picture(self.folder / row.file, limited=False) as image:
                return image.height, image.width
        return settings["height"], settings["width"]

    def _unwritable(self, error: OSError) -> CascadeError:
        return StorageError(f"{self.folder}: cannot be written: {error.strerror or error}; name another with --out")


def _locked(path: Path) -> RunLock:
    lock = RunLock(path, None)
    try:
        lock.acquire()
    except CascadeError:
        lock.close()
        raise
    return lock


def _files(entry: Mapping[str, Any]) -> Iterator[str]:
    """The files of a picture."""
    yield from (entry["file"], sidecar(entry["file"]), *entry.get("stages", {}).values())


def _read_stars(path: Path) -> frozenset[str] | set[str]:
    """The starred pictures. Raises CascadeError for a malformed file."""
    if not path.exists():
        return set()
    try:
        return set(read_json_file(path)["stars"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CascadeError(f'{path}: expected {{"stars": [...]}}; repair or remove it') from None
