"""Tar files of other people's: their members, as far as the headers can be true."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from cascade.files.text import open_regular

_DAMAGED = (tarfile.TarError, ValueError, OverflowError, LookupError, TypeError, RecursionError, MemoryError)
"""What the library raises for headers that nobody writes."""


class BadTarError(OSError):
    """Why a file is no tar that can be read in place; to stand behind its name, so without it."""


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in an uncompressed tar, in order. Raises OSError: BadTarError where its headers cannot be true.

    A size below zero would send the library back to where it was, for ever; a sparse member may claim to hold more
    than any memory, and has no place that could be read.
    """
    with open_regular(path) as file:
        length = path.stat().st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                last = -1
                while (member := tar.next()) is not None:
                    _check(member, last, length)
                    last = member.offset
                    if member.isfile():
                        yield member
        except _DAMAGED as error:
            raise BadTarError(" ".join(str(error).split()) or type(error).__name__) from None


def _check(member: tarfile.TarInfo, last: int, length: int) -> None:
    """last: where the header before begins. length: of the file."""
    if member.issparse():
        raise tarfile.ReadError("it holds sparse members")
    if member.offset <= last or member.size < 0 or (member.isreg() and member.offset_data + member.size > length):
        raise tarfile.ReadError("a member has a size that cannot be")
