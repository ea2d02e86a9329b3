"""The user's text and JSON files: detection of their encoding, of files that are not text, and of any defect."""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Never

from cascade import system
from cascade.errors import quoted

_CHUNK = 1 << 13
_LOOKED_AT = 4096  # bytes examined for the encoding
_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = "holds zero bytes, so it is not UTF-8 text; save it as UTF-8"


class NotTextError(ValueError):
    """Bytes are not text. The message follows the file's name, so it does not contain it."""


class NoFileError(OSError):
    """A path names neither a file nor a folder."""


def open_regular(path: str | Path) -> io.BufferedReader:
    """A file, opened for reading. Raises OSError: NoFileError for a pipe or device, on which reading might block."""
    handle = system.open_to_read(path)
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind) or stat.S_ISDIR(kind):
        return open(handle, "rb")  # noqa: PTH123 - an open handle; raises IsADirectoryError
    os.close(handle)
    raise NoFileError(errno.EINVAL, "a pipe or a device, not a file", str(path))


def content_of(path: str | Path) -> bytes:
    """All bytes of a file. Raises OSError: NoFileError for a pipe or device."""
    with open_regular(path) as file:
        return file.read()


def check_regular(path: Path) -> Path:
    """The path, if it is a file or free. Raises NoFileError for a pipe or a device: to open one might wait for ever."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):
        return path
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise NoFileError(errno.EINVAL, "a pipe or a device, no file", str(path))
    return path


def read_text(path: str | Path) -> str:
    """The text of a file, with LF as line ends. Raises OSError, NotTextError."""
    with open_regular(path) as file:
        return decoded(file.read())


def decoded(content: bytes) -> str:
    """Text from UTF-8, or from UTF-16 or UTF-32 if so marked, with LF as line ends. Raises NotTextError."""
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise NotTextError(_not(encoding)) from None
    if "\0" in text:
        raise NotTextError(_NO_TEXT)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(file: BinaryIO) -> Iterator[str]:
    """Lines without their ends (LF, CRLF or CR), read as needed; bytes that are not UTF-8 become lone surrogates.

    Raises NotTextError for invalid UTF-16 or UTF-32.
    """
    start = _start(file)
    encoding = encoding_of(start)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
    line: list[str] = []  # pieces, because appending many chunks to a string would copy it each time
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
    """JSON that can be written in UTF-8: letters as they are, or all escaped if one is not a valid character.

    Bytes of a file name that are not UTF-8 are lone surrogates in Python, and JSON's escapes preserve them.
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
    """The encoding of a text that begins with `start`. Raises NotTextError for zero bytes that are not UTF-16's.

    UTF-16 without a byte order mark is recognised by zeros in every other byte, as most characters have them: in the
    second byte of each pair if it is little-endian, else in the first.
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
    """The first bytes, enough for a mark; a pipe may return them one by one."""
    start = b""
    while len(start) < len(codecs.BOM_UTF32_LE) and (chunk := _read(file)):
        start += chunk
    return start


def _read(file: BinaryIO) -> bytes:
    """The bytes available, without waiting for more."""
    return file.read1(_CHUNK) if isinstance(file, io.BufferedReader) else file.read(_CHUNK)


def _not(encoding: str) -> str:
    return f"not {encoding.removesuffix('-sig').upper()}; save the file as UTF-8"


# --- JSON ------------------------------------------------------------------------------------------------------------
# JSON from untrusted files: any defect is a ValueError with the reason.

LARGEST = 256 << 20
"""Maximum bytes of a JSON file; the largest that cascade writes are indexes of a few megabytes."""
_DEEPEST = 100
"""Maximum nesting of brackets; cascade writes at most ten levels."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError.

    Stricter than JSON: refuses infinities and NaN in any notation, keys that occur twice in one object, and nesting so
    deep that programs that work on the value would fail.
    """
    whole = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(whole, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    _check_depth(value)
    return value


def read_json_file(path: str | Path) -> Any:
    """The value in a JSON file. Raises ValueError, and OSError, also for a pipe or a folder."""
    with open_regular(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MB")
    return parse_json(content)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(text)} is larger than the largest number")
    return value


def _constant(text: str) -> Never:
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{quoted(next(name for name in names if names.count(name) > 1))} occurs twice; keep one")
    return data


def _check_depth(value: Any) -> None:
    """Raises ValueError if brackets are nested too deep. Not recursive, which would fail at such a depth."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError("brackets are nested too deep")
