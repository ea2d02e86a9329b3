"""Parsing of setting values on a command line or in a table: a number, a threshold, a value for each stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from cascade.errors import quoted

T = TypeVar("T")
PRESETS = ("fast", "default", "best")
SETTINGS = ("steps", "guidance", "sampler", "aug_level", "threshold")
"""Settings that a call may override: one value for all stages, or {stage: value}."""


def per_stage(text: str, convert: Callable[[str], T]) -> T | dict[str, T]:
    """The value of `20` or `base=20,sr256=4`: one for all stages, or {stage: value}. Raises ValueError."""
    if "=" not in text:
        return convert(text.strip())
    values: dict[str, T] = {}
    for part in text.split(","):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not name or name in values:
            raise ValueError(f"{quoted(text)}; expected one value, or each stage once as in base=20,sr256=4")
        values[name] = convert(value)
    return values


def whole_number(text: str) -> int:
    """A whole number. Raises ValueError with a readable reason."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not a whole number") from None


def number(text: str) -> float:
    """A finite number. Raises ValueError with a readable reason."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{quoted(text)} is not a number")
    return value


def threshold_value(text: str) -> float | str:
    """A quantile, `clip` or `none`. Raises ValueError with a readable reason."""
    if text in ("clip", "none"):
        return text
    try:
        return number(text)
    except ValueError:
        raise ValueError(f"{quoted(text)}; expected a quantile such as 0.995, clip or none") from None
