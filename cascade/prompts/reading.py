"""From rows to checked records, and sets of prompts from one text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

from cascade.errors import CascadeError, quoted
from cascade.files.paths import expanded
from cascade.files.text import NotTextError, read_text
from cascade.prompts.records import BadLineError, Failure, PromptRecord, checked, record_of
from cascade.prompts.sources import STANDARD_INPUT, Counts, PlacedRow, Values, rows_of
from cascade.seeds import MAX_SEED
from cascade.text.language import escaped, well_formed


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


# --- sets ------------------------------------------------------------------------------------------------------------
# Sets of prompts from one text: alternatives, wildcards from files, and frames from one prompt to another.

MOST = 100_000
"""Upper bound of prompts from one text."""
_PIECES = re.compile(r"\\([{}|_\\])|\{([^{}]*)\}|__([A-Za-z0-9][A-Za-z0-9 .-]*?)__|(\{|\})")


def prompts_of_set(text: str, folder: str | Path = ".") -> Iterator[str]:
    """The prompts of `{red|green} car, __style__`: every choice of alternatives and of lines of style.txt, in order.

    The last alternative changes fastest. folder: of the wildcards' files. A backslash takes the meaning from a letter
    of {, }, | and _. Raises CascadeError for a brace alone, a file that is missing or empty, or too many prompts.
    """
    choices, place, count = list[list[str]](), 0, 1
    for match in _PIECES.finditer(text):
        choices.append([text[place : match.start()]])
        place = match.end()
        letter, alternatives, name, alone = match.groups()
        if alone:
            raise CascadeError(f"prompt: {quoted(text)} has a {alone} alone; write \\{alone} for the letter")
        if letter is not None:
            choices.append([letter])
        elif name is not None:
            choices.append(_lines(Path(folder) / f"{name}.txt"))
        else:
            choices.append([each.strip() for each in alternatives.split("|")])
        count *= len(choices[-1])
    if count > MOST:
        raise CascadeError(f"prompt: {quoted(text)} stands for {count:,} prompts; at most {MOST:,} are possible")
    return ("".join(chosen) for chosen in product(*choices, [text[place:]]))


def _lines(path: Path) -> list[str]:
    """The lines of a wildcard's file, without empty ones and comments."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except OSError as error:
        raise CascadeError(f"{path}: wildcard cannot be read: {error.strerror or error}") from None
    except NotTextError as error:
        raise CascadeError(f"{path}: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise CascadeError(f"{path}: no lines in it; write one alternative per line")
    return found


def way_between(first: str, last: str, frames: int) -> list[str]:
    """Prompts in the prompt language from one to another, in equal steps of their weights; the ends are these alone."""
    if frames < 2:
        raise CascadeError(f"frames: {frames}; expected at least 2")
    shares = [frame / (frames - 1) for frame in range(frames)]
    ends = escaped(first), escaped(last)
    between = [f"{ends[0]}:{1 - share:.6f} AND {ends[1]}:{share:.6f}" for share in shares[1:-1]]
    return [ends[0], *between, ends[1]]


def between_seeds(frames: Sequence[PromptRecord], last: int) -> list[PromptRecord]:
    """The frames with noise that leads, in equal steps along the sphere, from that of their seed to that of `last`.

    The first frame has its own noise and the last one that of `last`, in every bit.
    """
    if len(frames) < 2:
        raise CascadeError(f"frames: {len(frames)}; expected at least 2")
    if not 0 <= last <= MAX_SEED:
        raise CascadeError(f"travel_seed: {last}; expected a whole number in 0..{MAX_SEED}")
    shares = [frame / (len(frames) - 1) for frame in range(1, len(frames) - 1)]
    between = [replace(frame, variation=(last, share)) for frame, share in zip(frames[1:-1], shares, strict=True)]
    return [frames[0], *between, replace(frames[-1], seed=last)]
