"""A matrix: one prompt drawn with each value of one or two settings, and the sheet of its pictures with labelled axes.

Its cells are ordinary records of a run; only the sheet knows that they belong together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cascade.config.values import PRESETS, number, per_stage, threshold_value, whole_number
from cascade.errors import CascadeError, quoted
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.rasters import shown_file
from cascade.prompts.records import PromptRecord
from cascade.seeds import MAX_SEED
from cascade.text.language import well_formed

MOST_CELLS = 10_000
"""Upper bound of the pictures of a matrix."""
CELL = 256
"""Side of a picture on the sheet, in pixels, unless the sheet would be too large."""
LARGEST_SHEET = 16_000
"""Upper bound of the sheet's sides, in pixels."""
_LEAST_CELL, _GAP, _LINE, _FONT_SIZE = 16, 4, 18, 13
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?::(\d+))?")

PROMPT, WORDS, SEED, PRESET, LORA = "prompt", "words", "seed", "preset", "lora"
_SAMPLING: dict[str, Callable[[str], Any]] = {
    "steps": whole_number,
    "guidance": number,
    "guidance_rescale": number,
    "projection": lambda text: {"parallel": number(text)},
    "sampler": str,
    "aug_level": number,
    "threshold": threshold_value,
}
_RECORD: dict[str, Callable[[str], Any]] = {
    SEED: lambda text: _seed(text),
    "negative_prompt": str,
    "strength": lambda text: per_stage(text, number),
    PRESET: lambda text: _preset(text),
    LORA: number,
}
_FIELDS = {LORA: "adapter_factor"}
"""Fields of a record with another name than the setting."""
NAMES = (PROMPT, WORDS, *_RECORD, *_SAMPLING)
"""Settings that an axis may have, besides `condition.NAME`."""
_CONDITION = "condition."


def _seed(text: str) -> int:
    value = whole_number(text)
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"{quoted(text)}; expected a whole number in 0..{MAX_SEED}")
    return value


def _preset(text: str) -> str:
    if text not in PRESETS:
        raise ValueError(f"{quoted(text)}; expected one of {', '.join(PRESETS)}")
    return text


@dataclass(frozen=True)
class Axis:
    """A setting and its values: as they were written, which is how they are labelled, and as they are used."""

    name: str
    written: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def read(cls, text: str) -> Axis:
        """The axis of `steps=10,20` or `sampler=ddim|base=heun,sr256=ddim`; `seed=1..9` and `1..9:2` are ranges.

        Values are separated by commas, or where one of them has commas by `|`. Raises CascadeError.
        """
        given, equals, rest = text.partition("=")
        name = given.strip()
        if not name.startswith(_CONDITION):
            name = name.replace("-", "_")
        if not equals or not (name in NAMES or name.removeprefix(_CONDITION) not in ("", name)):
            close = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected condition.NAME or one of {', '.join(NAMES)}"
            raise CascadeError(f"--matrix: {quoted(text)}; {hint} It is written like steps=10,20,40")
        if name in (SEED, "steps"):
            rest = _RANGE.sub(_written_out, rest)
        written = tuple(value.strip() for value in rest.split("|" if "|" in rest else ","))
        try:
            return cls(name, written, tuple(_converted(name, value) for value in written))
        except ValueError as error:
            raise CascadeError(f"--matrix {name}: {error}") from None

    def label(self, place: int) -> str:
        """The label of a value."""
        if self.name in (PROMPT, WORDS):
            return self.written[place]
        name = self.name.removeprefix(_CONDITION)
        return f"{name.replace('_', ' ')} {self.written[place] or '(none)'}"


def _written_out(match: re.Match[str]) -> str:
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step < 1 or not first <= last <= first + step * MOST_CELLS:
        raise CascadeError(f"--matrix: {quoted(match[0])}; expected a range such as 1..9 or 10..50:10")
    return ",".join(map(str, range(first, last + 1, step)))


def _converted(name: str, text: str) -> Any:
    if name in (PROMPT, WORDS):
        return text
    if not text and name != "negative_prompt":
        raise ValueError("a value is empty; write values like 10,20,40")
    if name.startswith(_CONDITION):
        return text
    return _RECORD[name](text) if name in _RECORD else per_stage(text, _SAMPLING[name])


@dataclass(frozen=True)
class Matrix:
    """The columns, and the rows if there are any. Cell 0 is at the top left; cells are counted row by row."""

    columns: Axis
    rows: Axis | None = None

    @classmethod
    def read(cls, texts: Sequence[str]) -> Matrix:
        """The matrix of one or two axes, the columns first. Raises CascadeError."""
        if not 1 <= len(texts) <= 2:
            raise CascadeError(f"--matrix: {len(texts)} axes; give one for columns, and perhaps one for rows")
        axes = [Axis.read(text) for text in texts]
        matrix = cls(axes[0], axes[1] if len(axes) > 1 else None)
        if matrix.rows is not None and matrix.rows.name == matrix.columns.name and matrix.rows.name != WORDS:
            raise CascadeError(f"--matrix: {matrix.rows.name} is given twice; choose two settings")
        if len(matrix) > MOST_CELLS:
            raise CascadeError(f"--matrix: {len(matrix):,} pictures; at most {MOST_CELLS:,} are possible")
        return matrix

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The columns, and the rows."""
        return (self.columns,) if self.rows is None else (self.columns, self.rows)

    @property
    def has_adapters(self) -> bool:
        """Whether an axis scales adapters."""
        return any(axis.name == LORA for axis in self.axes)

    @property
    def has_prompts(self) -> bool:
        """Whether an axis holds whole prompts."""
        return any(axis.name == PROMPT for axis in self.axes)

    def __len__(self) -> int:
        return len(self.columns.values) * (1 if self.rows is None else len(self.rows.values))

    def records(self, prompt: str, seed: int) -> list[PromptRecord]:
        """The cells, as records with the indices 0, 1, ... seed: of cells without their own.

        Cells of equal adapters are neighbours, so that stages change seldom. Raises CascadeError for words that the
        prompt lacks.
        """
        cells = [self._cell(index, prompt, seed) for index in range(len(self))]
        return sorted(cells, key=lambda cell: (cell.adapter_factor is not None, cell.adapter_factor or 0.0))

    def first_of_each(self, prompt: str, seed: int) -> Iterator[PromptRecord]:
        """A cell for each value of each axis: enough to find a value that cannot be drawn."""
        columns = len(self.columns.values)
        indices = [*range(columns), *range(columns, len(self), columns)]
        return (self._cell(index, prompt, seed) for index in indices)

    def _cell(self, index: int, prompt: str, seed: int) -> PromptRecord:
        row, column = divmod(index, len(self.columns.values))
        chosen = list(zip(self.axes, (column, row), strict=False))
        record = PromptRecord(index, well_formed(prompt), seed, origin=self.origin(index))
        for axis, place in sorted(
            chosen, key=lambda one: one[0].name != PROMPT
        ):  # words are replaced in a whole prompt
            record = _with(record, axis, place)
        return record

    def origin(self, index: int) -> str:
        """A cell's labels, for messages."""
        row, column = divmod(index, len(self.columns.values))
        labels = [axis.label(place) for axis, place in zip(self.axes, (column, row), strict=False)]
        return f"--matrix, {quoted(', '.join(labels))}"


def _with(record: PromptRecord, axis: Axis, place: int) -> PromptRecord:
    """The record with one value of an axis."""
    value = axis.values[place]
    if axis.name == PROMPT:
        return replace(record, prompt=well_formed(value))
    if axis.name == WORDS:
        first = axis.values[0]
        if not first or first not in record.prompt:
            raise CascadeError(f"--matrix words: {quoted(first)} is not in the prompt {quoted(record.prompt)}")
        return replace(record, prompt=record.prompt.replace(first, well_formed(value)))
    if axis.name.startswith(_CONDITION):
        return replace(record, conditions={**(record.conditions or {}), axis.name.removeprefix(_CONDITION): value})
    if axis.name in _RECORD:
        return replace(record, **{_FIELDS.get(axis.name, axis.name): value})
    return replace(record, sampling={**record.sampling, axis.name: value})


def write_sheet(
    matrix: Matrix,
    entries: Iterable[Mapping[str, Any]],
    read: Callable[[str], bytes | None],
    path: Path,
    title: str,
    form: PictureFormat = RGB,
) -> None:
    """The sheet of a matrix, PNG: the title, a label above each column and left of each row; gray: no picture.

    entries: lines of the manifest. read: the content of a file in it, or None. Raises CascadeError for a picture that
    is damaged.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    columns, rows = len(matrix.columns.values), 1 if matrix.rows is None else len(matrix.rows.values)
    left = _margin(matrix.rows, font)
    cell = min(CELL, (LARGEST_SHEET - left) // columns - _GAP, (LARGEST_SHEET - 2 * _LINE) // rows - _GAP)
    cell = max(_LEAST_CELL, cell)
    top, pitch = 2 * _LINE, cell + _GAP
    sheet = Image.new("RGB", (left + columns * pitch, top + rows * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 1), _fitting(title, sheet.width - _GAP, font), "black", font)
    for column in range(columns):
        place = left + column * pitch, _LINE
        pen.text(place, _fitting(matrix.columns.label(column), cell, font), "black", font)
        for row in range(rows):
            corner = left + column * pitch, top + row * pitch
            pen.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), "lightgray")
    for row in range(rows if matrix.rows is not None else 0):
        assert matrix.rows is not None
        place = _GAP, top + row * pitch + (cell - _LINE) // 2
        pen.text(place, _fitting(matrix.rows.label(row), left - 2 * _GAP, font), "black", font)
    for entry in entries:
        content = read(entry["file"])
        if content is None or not 0 <= entry["index"] < len(matrix):
            continue
        picture = ImageOps.contain(shown_file(content, entry["file"], form), (cell, cell))
        row, column = divmod(entry["index"], columns)
        shift = (cell - picture.width) // 2, (cell - picture.height) // 2
        sheet.paste(picture, (left + column * pitch + shift[0], top + row * pitch + shift[1]))
    sheet.save(path, format="PNG")


def _margin(rows: Axis | None, font: Any) -> int:
    """The width of the row labels."""
    if rows is None:
        return _GAP
    longest = max(font.getlength(_plain(rows.label(place))) for place in range(len(rows.values)))
    return min(CELL, int(longest) + 1) + 2 * _GAP


def _fitting(text: str, width: int, font: Any) -> str:
    """`text` on one line, cut with an ellipsis where it would not fit into `width` pixels."""
    text = _plain(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _plain(text: str) -> str:
    """`text` in the letters that PIL's built-in font has."""
    return " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
