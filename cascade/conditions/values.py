"""The values of conditions, checked in one way for data, Python, the command line and prompt files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cascade.conditioning import Given
from cascade.conditions.settings import NONE, ConditionConfig, Conditions, Measure, NumberCondition, Value
from cascade.errors import CascadeError, quoted
from cascade.pictures.images import digest_of

DIGEST = "sha256:"


def checked(name: str, config: ConditionConfig, value: object, folder: Path | None = None) -> Value:
    """A value of the condition called `name`; `none` and missing values of tables become None.

    folder: of relative paths. Raises CascadeError with one line.
    """
    if is_missing(value):
        return None
    try:
        return config.checked(value, folder)
    except (ValueError, CascadeError) as error:
        raise CascadeError(f"condition {name}: {error}") from None


def is_missing(value: object) -> bool:
    """Whether a value stands for none: null, NaN (which pandas writes for null), an empty cell, the word `none`."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", NONE))


def measured(config: NumberCondition, measures: Mapping[Measure, float]) -> float:
    """The value of a condition with `measure`, within its range."""
    assert config.measure is not None, "it is read from a column"
    low, high = config.range
    return float(min(max(measures[config.measure], low), high))


def settled(each: Iterable[Conditions], given: Mapping[str, object], folder: Path | None = None) -> dict[str, Value]:
    """The values of one picture for all stages, `each` with its conditions; defaults in place of missing ones.

    Raises CascadeError for an unknown name, a wrong value, or one that is missing, and names what is known.
    """
    stages = list(each)
    known: dict[str, ConditionConfig] = {}
    for conditions in stages:
        known |= {name: config for name, config in conditions.items() if name not in known}
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CascadeError(f"condition {quoted(name)}: {_all_known(known)}{hint}")
    values: dict[str, Value] = {}
    for name in dict.fromkeys(name for conditions in stages for name in conditions):
        configs = [conditions[name] for conditions in stages if name in conditions]
        value = given.get(name, configs[0].default)
        if value is None:
            raise CascadeError(
                f"condition {name} is missing; {_all_known(known)}; give it with --condition {name}=... (in Python"
                f' conditions={{"{name}": ...}}), or `none` to leave it open'
            )
        # Two stages may read the same condition, with other labels or another range.
        read = [checked(name, config, value, folder) for config in configs]
        if len({one.shape for one in read if isinstance(one, Tensor)}) > 1:
            raise CascadeError(f"condition {name}: two stages read it with different channels; give them two names")
        values[name] = read[0]
    return values


def given_values(each: Iterable[Conditions], given: Mapping[str, object]) -> dict[str, object]:
    """Given values, checked once for all pictures that have them; none may be missing yet.

    Raises CascadeError for an unknown name or a wrong value.
    """
    stages = list(each)
    known = {name for conditions in stages for name in conditions}
    partial = [{name: conditions[name] for name in conditions if name in given} for conditions in stages]
    if given.keys() <= known:
        return {name: NONE if value is None else value for name, value in settled(partial, given).items()}
    settled(stages, {name: value for name, value in given.items() if name not in known})
    raise AssertionError("an unknown name is an error")


def _all_known(known: Conditions) -> str:
    if not known:
        return "this model reads text alone"
    return f"this model reads {', '.join(f'{name} ({config.described})' for name, config in known.items())}"


def recorded(values: Mapping[str, Value]) -> dict[str, str | float | None]:
    """Values for a recipe: labels and numbers themselves, vectors and pictures by digest."""
    return {
        name: f"{DIGEST}{digest_of(value)}" if isinstance(value, Tensor) else value for name, value in values.items()
    }


def restored(
    each: Iterable[Conditions], entries: Mapping[str, str | float | None], given: Mapping[str, object]
) -> dict[str, Value]:
    """The values that `recorded` gave these entries. given: vectors and pictures, whose digests the entries hold.

    Raises CascadeError for one that is not given or differs.
    """
    values: dict[str, object] = {name: NONE if value is None else value for name, value in entries.items()}
    for name, value in entries.items():
        if isinstance(value, str) and value.startswith(DIGEST):
            if name not in given:
                raise CascadeError(
                    f"condition {name}: was a picture or vector; name the same with --condition {name}=FILE"
                )
            values[name] = given[name]
    found = settled(each, values)
    for name, value in recorded(found).items():
        if value != entries[name]:
            raise CascadeError(f"condition {name}: is not the one that the picture was drawn with")
    return found


def joined(conditions: Conditions, rows: Sequence[Mapping[str, Value]], size: tuple[int, int]) -> dict[str, Given]:
    """The values of a batch; pictures are already fitted to `size`. A row without a value has the null."""
    return {
        name: Given(
            torch.stack([config.tensor(row.get(name), size) for row in rows]),
            torch.tensor([row.get(name) is not None for row in rows]),
        )
        for name, config in conditions.items()
    }


def blank(conditions: Conditions, count: int, size: tuple[int, int]) -> dict[str, Given]:
    """Zeros in place of values, for counting the cost of a network."""
    present = torch.ones(count, dtype=torch.bool)
    return {name: Given(config.blank(count, size), present) for name, config in conditions.items()}
