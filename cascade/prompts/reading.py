"""Conversion of rows to records: each is checked, and gets an id and a seed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from itertools import chain

from cascade.errors import CascadeError
from cascade.files.paths import expanded
from cascade.prompts.columns import checked
from cascade.prompts.disk import Counts
from cascade.prompts.formats import Values
from cascade.prompts.record import BadLineError, Failure, PromptRecord, record_of
from cascade.prompts.sources import STANDARD_INPUT, PlacedRow, rows_of
from cascade.quoting import quoted
from cascade.text.captions import well_formed


def given_prompts(prompts: Iterable[str], seed: int) -> Iterator[PromptRecord]:
    """Records for prompts of the command line; all have the given seed."""
    return (PromptRecord(index, well_formed(prompt), seed) for index, prompt in enumerate(prompts))


def read_prompts(source: str, run_seed: int, conditions: Collection[str] = ()) -> Iterator[PromptRecord | Failure]:
    """The prompts of a file, a folder of .txt captions, or standard input (`-`, one prompt per line), as needed.

    A line without a seed gets one from (run seed, its id), or without an id from its text and the number of earlier
    lines with that text. conditions: names of further columns, those of the model's conditions. Raises CascadeError,
    immediately, when the file is missing, empty or of an unknown kind, or its header is wrong.
    """
    source = expanded(source)
    name = "standard input" if source == STANDARD_INPUT else source
    rows = rows_of(source, conditions)
    first = next(rows, None)
    if first is None:
        raise CascadeError(f"{name}: no prompts in it; write one per line")
    return _records(chain([first], rows), name, run_seed, conditions)


def _records(
    rows: Iterable[PlacedRow], name: str, run_seed: int, conditions: Collection[str]
) -> Iterator[PromptRecord | Failure]:
    with closing(Counts()) as counts:
        for index, (place, row) in enumerate(rows):
            origin = well_formed(name + place)  # file names need not be UTF-8
            try:
                yield _record(row, run_seed, counts, index, origin, conditions)
            except BadLineError as error:
                yield Failure(origin, str(error), index)


def _record(
    row: Values, run_seed: int, counts: Counts, index: int, origin: str, conditions: Collection[str]
) -> PromptRecord:
    if isinstance(row, BadLineError):
        raise row
    values = checked(row, conditions)
    identifier = values.get("id")
    if identifier is not None and counts.add("id", identifier):
        raise BadLineError(f"id: {quoted(identifier)} is used on an earlier line; every id must be different")
    return record_of(values, run_seed, earlier=counts.add("text", values["prompt"]), index=index, origin=origin)
