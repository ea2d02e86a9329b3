"""Glob patterns in paths: `*`, `?`, `[...]` and `**`, unless a file or folder has exactly that name."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from cascade.errors import CascadeError


def matching(pattern: str) -> list[str]:
    """The files that a path or a pattern matches, sorted.

    The longest leading part that exists counts as a name, so that a folder named `a[1]` can be searched.
    Raises CascadeError for a pattern that searches the whole disk.
    """
    escaped = _with_names_escaped(pattern)
    start, deep, _ = escaped.partition("**")
    if deep and Path(start.partition("*")[0] or ".").resolve() == Path("/"):
        raise CascadeError(f"{pattern}: searches the whole disk; write the folder before `**`")
    found = glob.glob(escaped, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute patterns
    return sorted(path for path in found if Path(path).is_file())


def _with_names_escaped(pattern: str) -> str:
    ends = [len(pattern), *(place for place, letter in reversed(list(enumerate(pattern))) if letter == "/")]
    for end in ends:
        name, rest = pattern[:end], pattern[end:]
        if not glob.has_magic(name):
            return pattern
        if os.path.lexists(name):
            return glob.escape(name) + rest
    return pattern
