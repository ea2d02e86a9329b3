"""The package's exceptions, for failures that are not bugs in it; and untrusted text made safe to print.

Each message is one line.

CascadeError            a prompt, setting, argument or file is wrong; the same call will fail again
  StorageError          a folder or disk failed: full, not writable, missing; once fixed, the same call continues
  ShortageError         not enough memory; a smaller batch, picture or network may fit
  DownloadError         a hub could not be reached or lacks the model; a later try may succeed
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence


class CascadeError(ValueError):
    """Bad input: one line that names the file, setting or value, what was expected, and the way out.

    The command line prints it without a traceback and exits with status 2.
    """


class StorageError(CascadeError):
    """A folder or disk failed: it is full, not writable or missing. Once that is fixed, the same call continues."""


class ShortageError(CascadeError):
    """There is not enough memory for this size; a smaller batch, picture or network may fit."""


class DownloadError(CascadeError):
    """A hub could not be reached, or lacks the requested model."""


def output_error(error: OSError) -> StorageError:
    """The error of a standard output that cannot be written."""
    return StorageError(f"standard output: cannot be written: {error.strerror or error}; what was drawn or saved stays")


# --- printing untrusted text -----------------------------------------------------------------------------------------
# Untrusted text (names, prompts, ids, values) made safe to print: no terminal control codes, limited length.

LONGEST = 200
"""Maximum number of characters of a value in a message; the message gives the full number if it is cut."""
LONGEST_LINE = 2000
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories without a glyph but with an effect: control codes, writing directions, line separators."""
_JOINERS = "\u200c\u200d"
"""Members of these categories that are harmless; without them emoji and several scripts fall apart."""


def shown(text: str) -> str:
    """`text` on one line, with characters that affect a terminal escaped as in Python: `\\x1b`."""
    return _escaped(text, lambda letter: letter.encode("unicode_escape").decode())


def shown_lines(text: str) -> str:
    """`shown`, but line ends, which are cascade's own, are kept."""
    return "\n".join(map(shown, text.split("\n")))


def message(text: str) -> str:
    """Each line `shown`, and cut to the length limit in case a long value was not cut before."""
    return "\n".join(shown(_cut(line, LONGEST_LINE)) for line in text.split("\n"))


def shown_json(text: str) -> str:
    """Equivalent JSON, with JSON's own escapes."""
    return _escaped(text, lambda letter: json.dumps(letter)[1:-1])


def quoted(value: object) -> str:
    """`repr` of a value, cut to `LONGEST` characters."""
    if isinstance(value, str):
        return _cut(value, LONGEST, repr)
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list of lists of lists
        text = f"a value ({type(value).__name__})"
    return _cut(text, LONGEST)


def named(path: Sequence[str]) -> str:
    """The dotted name of a setting; its sections and keys may be untrusted."""
    return _cut(shown(".".join(path)), LONGEST)


def _cut(text: str, longest: int, written: Callable[[str], str] = str) -> str:
    """The beginning of `text`, passed through `written`, and its full length if it is cut."""
    if len(text) <= longest:
        return written(text)
    return f"{written(text[:longest])}... ({len(text):,} letters)"


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():  # nearly always, and quick
        return text
    return "".join(escape(letter) if _steers(letter) else letter for letter in text)


def _steers(letter: str) -> bool:
    return letter not in _JOINERS and unicodedata.category(letter) in _STEERING
