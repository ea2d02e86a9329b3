"""JSON of files that anybody may have written to: whatever is wrong with it is a ValueError with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Never

from cascade.files.text import open_regular
from cascade.quoting import quoted

LARGEST = 256 << 20
"""Bytes of a JSON file; of ours the largest are indexes of some megabytes."""
_DEEPEST = 100
"""Brackets within brackets; of ours no more than ten."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError.

    Refused beyond what JSON itself refuses: infinities and NaN, in whatever way they are written, keys that stand twice
    in one object, and depths from which on programs that work on the value fail.
    """
    whole = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(whole, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    _check_depth(value)
    return value


def read_json_file(path: str | Path) -> Any:
    """The value in a JSON file. Raises OSError, for a pipe or a folder in its place too, and ValueError."""
    with open_regular(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MB")
    return parse_json(content)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(text)} is beyond the largest number")
    return value


def _constant(text: str) -> Never:
    raise ValueError(f"{text} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{quoted(next(name for name in names if names.count(name) > 1))} stands twice; keep one")
    return data


def _check_depth(value: Any) -> None:
    """Level by level, for a function that calls itself would itself be too deep."""
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
