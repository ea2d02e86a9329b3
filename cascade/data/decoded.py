"""Finite records with their pictures decoded once, square and at the stage's resolution, in one memory-mapped file.

For each source, resolution and aspect a folder holds `NAME.pixels`, stored values (N, C, R, R), `NAME.records`, one
line of JSON per record (for a stage with conditions, with their values), and `NAME.json`, which describes their origin
and is written last. All are replaced atomically. Any number of processes map the same file, of which the system holds
one copy in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.utils.data import Dataset

from cascade.conditions.values import is_missing
from cascade.config.data import FORMAT_VERSION
from cascade.data.records import BadRecordError, Record, Records
from cascade.data.transforms import check_strip, decode, resize, square
from cascade.data.workers import read_by_workers
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file, read_json, write_json
from cascade.files.locks import lock_file
from cascade.files.text import parse_json
from cascade.pictures.format import RGB, PictureFormat
from cascade.settings import Noted, parse

logger = logging.getLogger("cascade.data")


@dataclass(frozen=True)
class Making:
    """Settings of decoding. Everything that affects the pixels is in `name` or `of`.

    name: of the files. of: a description of the source, as JSON; the files are rebuilt when it differs.
    """

    folder: Path
    resolution: int
    aspect: Literal["crop", "pad"]
    workers: int
    of: dict[str, Any]
    form: PictureFormat = RGB

    @property
    def name(self) -> str:
        """The name of the source's folder."""
        source = self.of["source"] if "conditions" not in self.of else [self.of["source"], self.of["conditions"]]
        digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        kind = "" if self.form.is_rgb else f"-{self.form.channels}-{self.form.values}"
        return f"{digest[:16]}-{self.resolution}-{self.aspect}{kind}"


class _Said(Noted):
    """What is read of the JSON beside the pixels."""

    count: int = Field(ge=1, lt=1 << 40)
    resolution: int = Field(ge=1, lt=1 << 20)
    of: dict[str, Any] = Field(default_factory=dict)


_Line = tuple[str, list[str], str | None]
"""(name for messages, captions, problem or None)."""
_Values = tuple[dict[str, Any], str | None]
"""(values of the conditions by name, folder of relative paths among them)."""
_LINE, _WITH_VALUES = TypeAdapter(_Line), TypeAdapter(tuple[_Line, _Values])


class DecodedRecords:
    """The records of a source, each picture (C, R, R) as stored. Only the files of the folder are read."""

    def __init__(self, folder: Path, name: str, form: PictureFormat = RGB) -> None:
        self._folder, self._name, self._form = folder, name, form
        said = parse(_Said, read_json(folder / f"{name}.json"), str(folder / f"{name}.json"))
        shape = (said.count, form.channels, said.resolution, said.resolution)
        path = folder / f"{name}.pixels"
        if not path.is_file() or path.stat().st_size != math.prod(shape) * form.dtype.itemsize:
            raise CascadeError(f"{path}: its size differs from the one in {name}.json; delete {folder} and start again")
        lines = folder / f"{name}.records"
        if not lines.is_file() or not lines.stat().st_size:
            raise CascadeError(f"{lines}: missing or empty; delete {folder} and start again")
        self._valued = "conditions" in said.of
        # A plain array: slicing numpy's memmap class takes ten times as long.
        self._pixels = np.asarray(np.memmap(path, form.values, "r", shape=shape))
        self._lines = np.asarray(np.memmap(lines, np.uint8, "r"))
        self._ends = np.flatnonzero(self._lines == ord("\n"))
        if len(self._ends) != said.count:
            raise CascadeError(f"{lines}: {len(self._ends)} lines for {said.count} pictures; delete {folder}")

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Record:
        (origin, captions, reason), (values, place) = self._described(index)
        if reason is not None:
            raise BadRecordError(origin, reason)
        picture = torch.from_numpy(np.array(self._pixels[index]))
        return Record(picture, tuple(captions), origin, values=values, folder=None if place is None else Path(place))

    def captions(self) -> Iterator[tuple[str, ...]]:
        for index in range(len(self)):
            (_, captions, _), _ = self._described(index)
            yield tuple(captions)

    def _described(self, index: int) -> tuple[_Line, _Values]:
        """A record's line, and the values of its conditions."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        line = self._lines[start : int(self._ends[index])].tobytes()
        none: _Values = ({}, None)
        with suppress(ValueError):  # a name that is not UTF-8 is written as lone surrogates, which this parser refuses
            return _WITH_VALUES.validate_json(line) if self._valued else (_LINE.validate_json(line), none)
        try:
            read = parse_json(line)
            if self._valued:
                return _WITH_VALUES.validate_python(read, strict=False)
            return _LINE.validate_python(read, strict=False), none
        except ValueError:
            return (f"{self._folder / self._name}.records, line {index + 1}", [], "its line is damaged"), none

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a path: another process maps the same files."""
        return type(self), (self._folder, self._name, self._form)


def decoded(records: Records, making: Making) -> DecodedRecords:
    """The decoded copy of `records`, made now if missing. One of several processes makes it, the others wait.

    Raises CascadeError when the disk has no room for it.
    """
    folder, name = making.folder, making.name
    with lock_file(folder / f".{name}.lock"):
        if not _is_current(making, len(records)):
            _make(records, making)
    return DecodedRecords(folder, name, making.form)


def _is_current(making: Making, count: int) -> bool:
    path = making.folder / f"{making.name}.json"
    return path.exists() and read_json(path) == _description(making, count)


def _description(making: Making, count: int) -> dict[str, Any]:
    form = {} if making.form.is_rgb else {"pictures": [str(making.form), [list(pair) for pair in making.form.limits]]}
    return {"format": FORMAT_VERSION, "count": count, "resolution": making.resolution, "of": making.of, **form}


def _make(records: Records, making: Making) -> None:
    count, side = len(records), making.resolution
    size = count * making.form.bytes_per_pixel * side**2
    free = shutil.disk_usage(making.folder).free
    if size > free:
        raise CascadeError(
            f"data.decoded: {count} pictures of {side} px take {size / 1e9:.1f} GB, but {making.folder} has"
            f" {free / 1e9:.1f} GB free; name another folder, or leave data.decoded out"
        )
    logger.info("decoding %d pictures to %d px, once: %s", count, side, making.folder / making.name)
    base = making.folder / making.name
    (base.parent / f"{base.name}.json").unlink(missing_ok=True)
    with (
        atomic_file(f"{base}.pixels") as pixels,
        atomic_file(f"{base}.records") as lines,
        pixels.open("wb") as pixels_file,
        lines.open("w", encoding="utf-8", newline="\n") as lines_file,
        closing(_made(_Squares(records, making), count, making.workers)) as made,
    ):
        nothing = bytes(making.form.bytes_per_pixel * side**2)
        for line, values, picture in made:
            pixels_file.write(nothing if picture is None else picture.numpy().tobytes())
            whole = [line, values] if "conditions" in making.of else line
            lines_file.write(json.dumps(whole, default=_plain) + "\n")
    write_json(f"{base}.json", _description(making, count))


def _plain(value: Any) -> Any:
    """An array as a list; what JSON cannot hold as text, which reading refuses with its reason."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


_Square = tuple[_Line, _Values, Tensor | None]
"""What is stored of a record; None: it has no picture."""


class _Squares(Dataset[_Square]):
    """The records in the form in which they are stored."""

    def __init__(self, records: Records, making: Making) -> None:
        self._records, self._making = records, making

    def __getitem__(self, index: int) -> _Square:
        try:
            record = self._records[index]
            picture = decode(record, self._making.form)
            check_strip(record, picture, self._making.aspect)
            making = self._making
            picture = resize(square(picture, making.aspect, making.form), making.resolution, making.form)
        except BadRecordError as error:
            return (error.origin, [], error.reason), ({}, None), None
        values = {name: value for name, value in record.values.items() if not is_missing(value)}
        folder = None if record.folder is None else str(record.folder)
        return (record.origin, list(record.captions), None), (values, folder), picture


def _made(squares: _Squares, count: int, workers: int) -> Generator[_Square, None, None]:
    if workers == 0:
        yield from map(squares.__getitem__, range(count))
        return
    with closing(read_by_workers(squares, range(count), workers)) as made:
        yield from made


def stamp_of_files(paths: Iterable[str | Path]) -> str:
    """A digest that changes when files are added, removed, or written to."""
    digest = hashlib.sha256()
    for path in map(str, paths):
        said = os.stat(path)  # noqa: PTH116 - of a million files
        digest.update(f"{path}\0{said.st_size}\0{said.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
