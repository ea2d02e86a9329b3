"""Finished pictures: files in a folder or in tar shards, each with a line in the manifest."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cascade import system
from cascade.batch.folder import Layout, foreign_file
from cascade.batch.manifest import Manifest, made_by
from cascade.batch.metadata import FORMATS, encode, sidecar
from cascade.batch.plan import Target, subfolder
from cascade.drawing.task import Drawn
from cascade.errors import CascadeError
from cascade.files.atomic import discard, fresh_file
from cascade.files.containers import BadTarError
from cascade.files.containers import members as tar_members


class Store(Protocol):
    """Files by name. Names are those in the manifest."""

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:
        """The name of a picture's file."""

    def unit(self, index: int) -> int | None:
        """The number of the tar shard that a prompt belongs to; None: no tars."""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write each file in full. Raises OSError."""

    def read(self, name: str) -> bytes | None:
        """A file's content, or None when it is missing."""

    def finish(self, unit: int) -> None:
        """Finish a unit: all its files are written."""


class FolderStore:
    """Files in a folder. Until they are complete they are in `temporary`."""

    def __init__(self, folder: Path, temporary: Path, may_replace: bool = True) -> None:
        """may_replace: whether existing files with the same names belong to this run."""
        self._folder, self._temporary, self._may_replace = folder, temporary, may_replace

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:
        return f"{subfolder(index, num_images)}{stem}.{ending}"

    def unit(self, index: int) -> int | None:  # noqa: ARG002 - the protocol's
        return None

    def write(self, files: Mapping[str, bytes]) -> None:
        if not self._may_replace:
            _check_free(self._folder / name for name in files)
        for name, content in files.items():
            place(self._folder / name, content, self._temporary)

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.is_file() else None

    def finish(self, unit: int) -> None:
        """Does nothing: every file was complete when it got its name."""


class TarStore:
    """WebDataset: `000000.tar/000000-a-fox.png` is a member of 000000.tar, which holds prompts 0 to `size` - 1.

    Until a shard is complete its pictures are files in `spool`, so that a kill loses none. Members are sorted by name
    and have no time, so that the same pictures make the same tar.
    """

    def __init__(self, folder: Path, spool: Path, temporary: Path, size: int, may_replace: bool = True) -> None:
        """size: prompts per shard. may_replace: whether existing tars with the names of shards belong to this run."""
        self._may_replace = may_replace
        self._folder, self._spool, self._temporary, self._size = folder, spool, temporary, size
        self._open: tuple[str, dict[str, tuple[int, int]]] = ("", {})

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:  # noqa: ARG002 - the protocol's
        return f"{self._tar(index // self._size)}/{stem}.{ending}"

    def unit(self, index: int) -> int | None:
        return index // self._size

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            place(self._spool / name, content, self._temporary)

    def read(self, name: str) -> bytes | None:
        spooled = self._spool / name
        if spooled.is_file():
            return spooled.read_bytes()
        tar, _, member = name.partition("/")
        start, length = self._members(tar).get(member, (0, -1))
        if length < 0:
            return None
        with (self._folder / tar).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def finish(self, unit: int) -> None:
        """Pack the shard, if files are waiting for it."""
        tar = self._tar(unit)
        waiting = self._spool / tar
        if not waiting.is_dir():
            return
        if not self._may_replace:
            _check_free([self._folder / tar])
        members = {*self._members(tar), *(path.name for path in waiting.iterdir())}  # some may have been damaged
        packed = self._temporary / tar
        with tarfile.open(packed, mode="w", format=tarfile.USTAR_FORMAT) as file:
            for member in sorted(members, key=lambda name: name.partition(".")[::2]):
                content = self.read(f"{tar}/{member}")
                if content is None:
                    raise FileNotFoundError(errno.ENOENT, "it was removed while the run went on", f"{tar}/{member}")
                information = tarfile.TarInfo(member)
                information.size = len(content)
                file.addfile(information, io.BytesIO(content))
        self._open = ("", {})
        system.replace(packed, self._folder / tar)
        shutil.rmtree(waiting)

    def _tar(self, unit: int) -> str:
        return f"{unit:06d}.tar"

    def _members(self, tar: str) -> dict[str, tuple[int, int]]:
        """(start, length) of a tar's members, up to the first damaged one; none if the tar is missing."""
        if self._open[0] != tar:
            members: dict[str, tuple[int, int]] = {}
            # A disk that fails to read is told, for what cannot be seen now would be left out of the tar for ever.
            with suppress(FileNotFoundError, BadTarError):
                for information in tar_members(self._folder / tar):
                    members[information.name] = (information.offset_data, information.size)
            self._open = (tar, members)
        return self._open[1]


def _check_free(paths: Iterable[Path]) -> None:
    """Raises CascadeError for a file that exists and must not be replaced."""
    for path in paths:
        if path.exists():
            raise foreign_file(path)


def place(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file in full under a temporary name, then rename it.

    It is not synced to the disk: a file lost in a power cut fails the next run's SHA-256 check and is drawn again.
    """
    written = fresh_file(temporary)
    try:
        written.write_bytes(content)
        path.parent.mkdir(exist_ok=True, parents=True)
        system.replace(written, path)
    except BaseException:
        discard(written)
        raise


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# --- pictures --------------------------------------------------------------------------------------------------------
# Finished pictures: files in a store, each with a line in the manifest.

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
