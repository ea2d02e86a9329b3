"""Where finished files go: a folder with subfolders, or the tar shards of WebDataset."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cascade import system
from cascade.batch.earlier import not_ours
from cascade.batch.plan import subfolder


class Store(Protocol):
    """Files by name. A name is as the manifest says it."""

    def name(self, index: int, stem: str, ending: str, num_images: int) -> str:
        """The name of a picture's file."""

    def unit(self, index: int) -> int | None:
        """To which tar shard a prompt belongs; None: prompts are on their own."""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write each file whole. Raises OSError."""

    def read(self, name: str) -> bytes | None:
        """A file's content, or None when it is not there."""

    def finish(self, unit: int) -> None:
        """All files of a unit are written."""


class FolderStore:
    """Files in a folder. Half-written ones stand aside in `temporary`, until they are whole."""

    def __init__(self, folder: Path, temporary: Path, may_replace: bool = True) -> None:
        """may_replace: whether what stands there under the name of a file is ours."""
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
        """Nothing is to be done: every file was whole when it got its name."""


class TarStore:
    """WebDataset: `000000.tar/000000-a-fox.png` is a member of 000000.tar, which holds prompts 0 to `size` - 1.

    Until all pictures of a shard are there, they wait as files in `spool`, so that a kill loses none. Members are in
    the order of their names and have no time, so that the same pictures make the same tar.
    """

    def __init__(self, folder: Path, spool: Path, temporary: Path, size: int, may_replace: bool = True) -> None:
        """size: prompts in a shard. may_replace: whether tars that stand there under the names of shards are ours."""
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
        """Pack the shard, if there are files that wait for it."""
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
                content = self.read(f"{tar}/{member}") or b""
                information = tarfile.TarInfo(member)
                information.size = len(content)
                file.addfile(information, io.BytesIO(content))
        self._open = ("", {})
        system.replace(packed, self._folder / tar)
        shutil.rmtree(waiting)

    def _tar(self, unit: int) -> str:
        return f"{unit:06d}.tar"

    def _members(self, tar: str) -> dict[str, tuple[int, int]]:
        """(start, length) of the members of a tar, up to where it is damaged; none if it is missing."""
        if self._open[0] != tar:
            members: dict[str, tuple[int, int]] = {}
            with suppress(OSError, tarfile.TarError), tarfile.open(self._folder / tar) as file:
                for information in file:
                    members[information.name] = (information.offset_data, information.size)
            self._open = (tar, members)
        return self._open[1]


def _check_free(paths: Iterable[Path]) -> None:
    """Raises CascadeError for a file that is there, and is not ours to replace."""
    for path in paths:
        if path.exists():
            raise not_ours(path)


def place(path: Path, content: bytes, temporary: Path) -> None:
    """Write a file whole: aside, then renamed.

    Nothing is synced to the disk: what a power cut takes, the next run misses by its SHA-256 and draws again.
    """
    handle, name = tempfile.mkstemp(dir=temporary)
    written = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        written.chmod(0o644)
        path.parent.mkdir(exist_ok=True, parents=True)
        system.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()
