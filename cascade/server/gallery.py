"""The gallery: a batch folder, in which what the page draws has a manifest beside those of the command line."""

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

from cascade.batch.layout import Layout
from cascade.batch.locks import RunLock
from cascade.batch.manifest import Manifest
from cascade.batch.metadata import sidecar
from cascade.batch.pictures import Finished, Pictures
from cascade.batch.stores import FolderStore, TarStore, place
from cascade.errors import CascadeError, StorageError
from cascade.files.parsed import parse_json, read_json_file
from cascade.files.paths import is_within
from cascade.files.picture import open_picture, read_rgb
from cascade.server.catalogue import Catalogue, Row, picture_id, stored_in
from cascade.server.sources import Sources
from cascade.server.traces import Traces

PART = "studio"
"""Of the folder: where its pictures lie, and in the names of its manifest and its lock."""
THUMBNAIL = 384
"""Longest side, in pixels."""


class _Store(FolderStore):
    """Pictures in a subfolder of their own: a run of the command line may have the same names."""

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:
        return f"{PART}/{super().name(index, stem, ending, num_images)}"


class Gallery:
    """Pictures that are there, and where new ones go. A command line may draw into the same folder meanwhile."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CascadeError when the folder cannot be written, or another gallery has it."""
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
        """Let go of everything; what was deleted is gone for good."""
        shutil.rmtree(self._trash, ignore_errors=True)
        self._catalogue.close()
        self._manifest.close()
        self._lock.close()

    def next_index(self) -> int:
        """For the pictures of one more prompt."""
        with self._counting:
            self._index += 1
            return self._index

    def sources(self) -> Sources:
        """Pictures that clients upload to have them changed; stored in the gallery's folder."""
        return Sources(self.state / "sources", self._temporary, lambda id: self.read(id)[1])

    def write(self, finished: Finished) -> dict[str, Any]:
        """Keep a picture; what the gallery says of it. Raises CascadeError when it cannot be written."""
        try:
            line = self._pictures.write(finished)
        except OSError as error:
            raise self._unwritable(error) from None
        self._refresh()
        return self.get(picture_id(line))

    def page(self, search: str, starred: bool, before: str | None, most: int) -> dict[str, Any]:
        """Some pictures, the newest first, and how many there are in all. before: see `Catalogue.rows`."""
        self._refresh()
        words = search.split()
        there = (row for row in self._catalogue.rows(words, starred, before) if self._is_there(row.file))
        return {
            "pictures": [self._told(row) for row in islice(there, most)],
            "total": self._catalogue.count(words, starred),
        }

    def get(self, id: str) -> dict[str, Any]:
        """What is said of a picture. Raises KeyError."""
        return self._told(self._row(id))

    def said(self, id: str) -> dict[str, Any]:
        """Its line of the manifest. Raises KeyError."""
        return self._row(id).entry

    def read(self, id: str) -> tuple[str, bytes]:
        """(the name of its file, the content). Raises KeyError."""
        file = self._row(id).file
        content = self._content(file)
        if content is None:
            raise KeyError(id)
        return file.rpartition("/")[2], content

    def thumbnail(self, id: str) -> bytes:
        """A small WebP. Raises KeyError, CascadeError for a damaged picture."""
        name, content = self.read(id)
        small = read_rgb(io.BytesIO(content), name)
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="WEBP", quality=88, method=2)
        return buffer.getvalue()

    def star(self, id: str, starred: bool) -> dict[str, Any]:
        """Mark a picture, or no longer. Raises KeyError, CascadeError."""
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
        """Put a picture aside, from where `restore` brings it back until the end. Raises KeyError, CascadeError."""
        row = self._row(id)
        if row.file != stored_in(row.file):
            raise CascadeError(f"{row.file}: stands in a tar, from which single pictures are not removed")
        aside = self._trash / row.id
        aside.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(_files(row.entry)):
            if self._is_ours(name) and (self.folder / name).is_file():
                (self.folder / name).replace(aside / str(number))
        self._catalogue.hide(row.id, True)

    def restore(self, id: str) -> dict[str, Any]:
        """Bring back what was deleted. Raises KeyError."""
        row = self._row(id)
        for number, name in enumerate(_files(row.entry)):
            if (self._trash / row.id / str(number)).is_file():
                (self._trash / row.id / str(number)).replace(self.folder / name)
        self._catalogue.hide(row.id, False)
        return self.get(id)

    def _opened(self, path: Path) -> Manifest:
        """Our own manifest, without the pictures that were deleted."""
        if path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if self._names_a_file(line)]
            place(path, b"".join(lines), self._temporary)
        manifest = Manifest(path)
        manifest.refresh()
        return manifest

    def _names_a_file(self, line: bytes) -> bool:
        try:
            return self._is_there(parse_json(line)["file"])
        except (ValueError, KeyError, TypeError):
            return False  # a kill within writing it

    def _refresh(self) -> None:
        """See what others drew since."""
        self._catalogue.refresh(self._stars)

    def _row(self, id: str) -> Row:
        row = self._catalogue.find(id)
        if row is None:
            raise KeyError(id)
        return row

    def _is_ours(self, file: str) -> bool:
        """Whether it lies in this folder: a manifest may come from anywhere, and say anything."""
        return is_within(self.folder / file, self.folder)

    def _is_there(self, file: str) -> bool:
        return self._is_ours(file) and (self.folder / stored_in(file)).is_file()

    def _content(self, file: str) -> bytes | None:
        if not self._is_there(file):
            return None
        return self._store.read(file) if file == stored_in(file) else self._tars.read(file)

    def _told(self, row: Row) -> dict[str, Any]:
        """A row as JSON for the page; the seed as text, because JavaScript would round it."""
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
        """Height and width: of a picture with a mask its own, which the manifest does not name."""
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
    """What belongs to a picture."""
    yield from (entry["file"], sidecar(entry["file"]), *entry.get("stages", {}).values())


def _read_stars(path: Path) -> frozenset[str] | set[str]:
    """Raises CascadeError for a file that is none of ours."""
    if not path.exists():
        return set()
    try:
        return set(read_json_file(path)["stars"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CascadeError(f'{path}: expected {{"stars": [...]}}; mend or remove it') from None
