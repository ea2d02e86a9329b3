"""What strangers wrote (names, prompts, ids, values) as it may be printed: it steers no terminal, and it is short."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence

LONGEST = 200
"""Letters of a value in a message; what is cut off is counted."""
LONGEST_LINE = 2000
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what is no letter but does something: controls, directions of writing, ends of lines."""
_JOINERS = "\u200c\u200d"
"""Directions too, but harmless, and without them emoji and several scripts fall apart."""


def shown(text: str) -> str:
    """`text` in one line, what would steer a terminal escaped as in Python: `\\x1b`."""
    return _escaped(text, lambda letter: letter.encode("unicode_escape").decode())


def shown_lines(text: str) -> str:
    """`shown`, but for the ends of lines, which are our own."""
    return "\n".join(map(shown, text.split("\n")))


def message(text: str) -> str:
    """Each line of a message `shown`, and cut where a value made it long that nothing else cut."""
    return "\n".join(shown(_cut(line, LONGEST_LINE)) for line in text.split("\n"))


def shown_json(text: str) -> str:
    """JSON that says the same, with JSON's own escapes."""
    return _escaped(text, lambda letter: json.dumps(letter)[1:-1])


def quoted(value: object) -> str:
    """A value as Python writes it, at most `LONGEST` letters of it."""
    if isinstance(value, str):
        return _cut(value, LONGEST, repr)
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list of lists of lists
        text = f"a value ({type(value).__name__})"
    return _cut(text, LONGEST)


def named(path: Sequence[str]) -> str:
    """The name of a setting, of sections and keys that may be anybody's."""
    return _cut(shown(".".join(path)), LONGEST)


def _cut(text: str, longest: int, written: Callable[[str], str] = str) -> str:
    """The beginning as `written` has it, and how much there was."""
    if len(text) <= longest:
        return written(text)
    return f"{written(text[:longest])}... ({len(text):,} letters)"


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():  # nearly always, and quick
        return text
    return "".join(escape(letter) if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    return letter not in _JOINERS and unicodedata.category(letter) in _STEERING
