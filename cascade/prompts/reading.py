"""Rows become records: each checked, with an id of its own and a seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """Prompts of the command line; the seed holds for each."""
    return (PromptRecord(index, well_formed(prompt), seed) for index, prompt in enumerate(prompts))


def read_prompts(source: str, run_seed: int) -> Iterator[PromptRecord | Failure]:
    """The prompts of a file, a folder of .txt captions, or standard input (`-`, a prompt a line), as they are needed.

    A line without a seed gets one from (run seed, its id), or without an id from its text and how often that text
    occurred before. Raises CascadeError, at once, when the file is missing, empty, of no known kind, or its header
    is wrong.
    """
    source = expanded(source)
    name = "standard input" if source == STANDARD_INPUT else source
    rows = rows_of(source)
    first = next(rows, None)
    if first is None:
        raise CascadeError(f"{name}: no prompts in it; write one a line")
    return _records(chain([first], rows), name, run_seed)


def _records(rows: Iterable[PlacedRow], name: str, run_seed: int) -> Iterator[PromptRecord | Failure]:
    with closing(Counts()) as counts:
        for index, (place, row) in enumerate(rows):
            origin = well_formed(name + place)  # names of files need not be UTF-8
            try:
                yield _record(row, run_seed, counts, index, origin)
            except BadLineError as error:
                yield Failure(origin, str(error), index)


def _record(row: Values, run_seed: int, counts: Counts, index: int, origin: str) -> PromptRecord:
    if isinstance(row, BadLineError):
        raise row
    values = checked(row)
    identifier = values.get("id")
    if identifier is not None and counts.add("id", identifier):
        raise BadLineError(f"id: {quoted(identifier)} stands on an earlier line; every id must be its own")
    return record_of(values, run_seed, earlier=counts.add("text", values["prompt"]), index=index, origin=origin)
