"""Text of other people's files: in which encoding it is, and whether it is text at all."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from cascade import system

_CHUNK = 1 << 13
_LOOKED_AT = 4096  # bytes that tell the encoding
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = "holds zero bytes, so it is no text in UTF-8; save it as UTF-8"


class NotTextError(ValueError):
    """Why bytes are no text; to stand behind the name of the file, so without it."""


class NoFileError(OSError):
    """What a path names is neither file nor folder."""


def open_regular(path: str | Path) -> BinaryIO:
    """A file, for reading. Raises OSError: NoFileError for a pipe or a device, where reading might wait for ever."""
    handle = system.open_to_read(path)
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
        return open(handle, "rb")  # noqa: PTH123 - of what is open already; raises IsADirectoryError
    os.close(handle)
    raise NoFileError(errno.EINVAL, "a pipe or a device, no file")


def read_text(path: str | Path) -> str:
    """The text of a file, its line ends as LF. Raises OSError, NotTextError."""
    with open_regular(path) as file:
        return decoded(file.read())


def decoded(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 where it says so, its line ends as LF. Raises NotTextError."""
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise NotTextError(_not(encoding)) from None
    if "\0" in text:
        raise NotTextError(_NO_TEXT)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(file: BinaryIO) -> Iterator[str]:
    """Lines without their ends (LF, CRLF or CR), as they are needed; of UTF-8 other bytes become lone surrogates.

    Raises NotTextError for what is not the UTF-16 or UTF-32 that it begins as.
    """
    start = _start(file)
    encoding = encoding_of(start)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
    line: list[str] = []  # in pieces: a line of many chunks would be copied as often
    try:
        for chunk in chain([start], iter(lambda: _read(file), b""), [b""]):
            first, *others = decoder.decode(chunk, final=not chunk).split("\n")
            line.append(first)
            for following in others:
                yield "".join(line)
                line = [following]
    except UnicodeDecodeError:
        raise NotTextError(_not(encoding)) from None
    if any(line):
        yield "".join(line)


def json_text(data: object, indent: int | None = None) -> str:
    """JSON that can be written in UTF-8: letters as they are, but all escaped where one is no character.

    Bytes of a name that are not UTF-8 are half characters in Python, which come back from JSON as they were.
    """
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    return text if is_utf8(text) else json.dumps(data, indent=indent)


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoding_of(start: bytes) -> str:
    """The encoding of a text that begins so. Raises NotTextError for zero bytes that are no UTF-16's either.

    UTF-16 without a byte order mark is known by every other byte, of most of the characters zero: the second of each
    pair in the little-endian one, else the first.
    """
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    looked_at = start[:_LOOKED_AT]
    if b"\0" not in looked_at:
        return "utf-8-sig"
    first, second = looked_at[::2], looked_at[1::2]
    for zeros, others, encoding in ((second, first, "utf-16-le"), (first, second, "utf-16-be")):
        if zeros.count(0) * 2 > len(zeros) and 0 not in others:
            return encoding
    raise NotTextError(_NO_TEXT)


def _start(file: BinaryIO) -> bytes:
    """The first bytes, enough for a mark: a pipe may give them one by one."""
    start = b""
    while len(start) < len(codecs.BOM_UTF32_LE) and (chunk := _read(file)):
        start += chunk
    return start


def _read(file: BinaryIO) -> bytes:
    """What is there, without waiting for more."""
    return file.read1(_CHUNK) if isinstance(file, io.BufferedReader) else file.read(_CHUNK)


def _not(encoding: str) -> str:
    return f"not {encoding.removesuffix('-sig').upper()}; save the file as UTF-8"
