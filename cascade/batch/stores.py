"""Storage of finished files: a folder with subfolders, or WebDataset's tar shards."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cascade import system
from cascade.batch.earlier import foreign_file
from cascade.batch.plan import subfolder
from cascade.checkpoint import discard, fresh_file
from cascade.files.tar import BadTarError
from cascade.files.tar import members as tar_members


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
