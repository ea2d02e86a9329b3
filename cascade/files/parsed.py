"""JSON from untrusted files: any defect is a ValueError with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Never

from cascade.files.text import open_regular
from cascade.quoting import quoted

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
