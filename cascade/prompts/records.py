"""A prompt with the settings of its line, or the line's defect; and the columns of prompt files."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade.config.values import number, per_stage, whole_number
from cascade.errors import CascadeError, quoted
from cascade.seeds import MAX_SEED, derive_seed
from cascade.text.language import well_formed

# --- record ----------------------------------------------------------------------------------------------------------
# A prompt to draw with the settings of its line, or the line's defect.


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw, and the settings of its line; None: the call's setting.

    index: its position among the prompts of the file, bad lines included, so that fixing one moves no other.
    conditions: values of the model's conditions, not yet checked. origin: `file:line`, for messages. sampling: further
    sampling settings by name. variation: of all noise, see `Recipe.variation_noise`. adapter_factor: a factor on the
    scales of the run's low-rank adapters.
    """

    index: int
    prompt: str
    seed: int
    origin: str = "command line"
    id: str | None = None
    negative_prompt: str | None = None
    num_images: int | None = None
    guidance: float | dict[str, float] | None = None
    steps: int | dict[str, int] | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | dict[str, float] | None = None
    regions: tuple[str, ...] | None = None
    conditions: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    variation: tuple[int, float] | None = None
    adapter_factor: float | None = None


@dataclass(frozen=True)
class Failure:
    """A line of a prompt file, or one of its pictures, that cannot be drawn, and why. index: the line's position."""

    origin: str
    reason: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class BadLineError(ValueError):
    """A defect of one line."""


def record_of(
    values: Mapping[str, Any], run_seed: int, *, earlier: int = 0, index: int = 0, origin: str
) -> PromptRecord:
    """A record of checked values. Its seed: its own; or from (run seed, id); or from (run seed, text, earlier).

    earlier: number of earlier lines with the same text.
    """
    identifier = values.get("id")
    named = ("id", identifier) if identifier else ("text", values["prompt"], earlier)
    seed = derive_seed(run_seed, *named)
    return PromptRecord(index, origin=origin, **{"seed": seed, **values})


# --- columns ---------------------------------------------------------------------------------------------------------
# The columns of a prompt file, with types and ranges of their values.

_MOST = 1_000_000  # steps, or pictures of one prompt
_LARGEST_EXACT = 2**53  # beyond it float64 cannot represent every whole number
_WHOLE_DECIMAL = re.compile(r"(?<=\d)\.0*$")  # as in `7.0`, which spreadsheets and pandas write for whole numbers
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, after the error handler `surrogateescape`


def checked(row: Mapping[str, Any], conditions: Collection[str] = ()) -> dict[str, Any]:
    """The values of a line, of the right types, without missing ones. Raises BadLineError.

    conditions: further columns, those of the model's conditions, whose values are checked later. With a value for one
    of them the prompt may be missing.
    """
    values: dict[str, Any] = {}
    given = {name: value for name, value in row.items() if name in conditions and value is not None}
    for column, value in row.items():
        if column in conditions:
            continue
        if column not in _COLUMNS:
            raise BadLineError(_unknown(column, conditions))
        if value is not None:
            values[column] = _COLUMNS[column](column, value)
    if not values.get("prompt"):
        if not given:
            raise BadLineError("prompt is missing")
        values["prompt"] = ""
    return values | ({"conditions": given} if given else {})


def check_header(header: Sequence[str], origin: str, conditions: Collection[str] = ()) -> None:
    """Raises CascadeError for a wrong header, which would spoil every line below it. conditions: see `checked`."""
    for column in header:
        if column not in _COLUMNS and column not in conditions:
            raise CascadeError(f"{origin}: {_unknown(column, conditions)}")
    named = "prompt" in header or any(column in conditions for column in header)
    if not named or len(set(header)) != len(header):
        raise CascadeError(f"{origin}: expected a header with each column once, including prompt")


def from_text(column: str, cell: str) -> Any:
    """The value of a cell's text. Raises BadLineError."""
    try:
        match column:
            case "seed" | "num_images":
                return whole_number(_WHOLE_DECIMAL.sub("", cell.strip()))
            case "guidance" | "strength":
                return per_stage(cell, number)
            case "steps":
                return per_stage(cell, whole_number)
    except ValueError as error:
        raise BadLineError(f"{column}: {error}") from None
    return cell.strip()


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without missing values: null, and NaN, which pandas writes for null.

    In {stage: value} too: there a table has every stage that occurs in any row.
    """
    values = {}
    for column, value in row.items():
        kept = {name: own for name, own in value.items() if not _is_null(own)} if isinstance(value, dict) else value
        if not _is_null(kept) and kept != {}:
            values[column] = kept
    return values


def utf8(text: str) -> str:
    """`text`, if its bytes were UTF-8. Raises BadLineError."""
    if _NOT_UTF8.search(text):
        raise BadLineError("not UTF-8; save the file as UTF-8")
    return text


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unknown(column: str, conditions: Collection[str]) -> str:
    known = (*_COLUMNS, *conditions)
    close = difflib.get_close_matches(column, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)}"
    return f"{quoted(well_formed(column))} is not a column; {hint}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of many digits"
    text = json.dumps(value, default=str)  # a table may hold values that JSON lacks: dates, bytes
    return text if len(text) <= 40 else text[:39] + "…"


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadLineError(f"{column}: expected text, found {_shown(value)}")
    if "\0" in value:
        raise BadLineError(f"{column}: holds a zero byte, so it is not text; save the file as UTF-8")
    return well_formed(utf8(value)).strip()


def _identifier(column: str, value: Any) -> str:
    """A non-empty id, which may be a number in JSON."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(column, value)
    if not text:
        raise BadLineError(f"{column}: is empty")
    return text


def _whole(column: str, value: Any, minimum: int, maximum: int) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT:
        value = int(value)  # pandas turns a column of whole numbers with missing ones into floats
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise BadLineError(f"{column}: expected a whole number in {minimum}..{maximum}, found {_shown(value)}")
    return value


def _weight(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise BadLineError(f"{column}: expected a number of at least 0, found {_shown(value)}")
    return float(value)


def _share(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise BadLineError(f"{column}: expected a number from 0 to 1, found {_shown(value)}")
    return float(value)


def _each_stage(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """`check` for one value, or for each of {stage: value}."""

    def checked(column: str, value: Any) -> Any:
        if isinstance(value, dict):
            # A file may contain any stage name; the message must stay on one line.
            return {stage: check(f"{column}.{json.dumps(str(stage))[1:-1]}", own) for stage, own in value.items()}
        return check(column, value)

    return checked


def _several_texts(column: str, value: Any) -> tuple[str, ...]:
    """A list of texts, or one text with semicolons between them."""
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise BadLineError(f"{column}: expected texts, found {_shown(value)}")
    return tuple(text for text in (_text(column, part) for part in parts) if text)


def _at_least_one(column: str, value: Any) -> int:
    return _whole(column, value, 1, _MOST)


_COLUMNS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "seed": lambda column, value: _whole(column, value, 0, MAX_SEED),
    "negative_prompt": _text,
    "id": _identifier,
    "num_images": _at_least_one,
    "guidance": _each_stage(_weight),
    "steps": _each_stage(_at_least_one),
    "image": _text,
    "mask": _text,
    "strength": _each_stage(_share),
    "regions": lambda column, value: _several_texts(column, value),
}

COLUMNS = tuple(_COLUMNS)
"""Names of the columns."""
