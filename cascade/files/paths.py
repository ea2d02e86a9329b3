"""Paths as people write them, where no shell has seen them: in settings, behind `--out=`, in Python."""

from __future__ import annotations

import os
from pathlib import Path

from cascade.errors import CascadeError


def expanded(path: str) -> str:
    """`~` and `~user` at the beginning of a path as the home folder that they mean, as a shell would.

    Without it a folder called `~` is made, and someone will then remove `~`. Raises CascadeError for a user whose home
    is not known, unless something is there under that very name.
    """
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)  # noqa: PTH111 - Path's own raises RuntimeError
    if home.startswith("~") and not os.path.lexists(path):
        user = path.partition("/")[0]
        raise CascadeError(f"{path}: the home folder of {user} is not known; write ./{path} for something called so")
    return home


def plain_path(path: str | Path) -> Path:
    """`path_of` for what libraries in Rust read or write. Raises CascadeError for bytes that are not UTF-8."""
    expanded_path = path_of(path)
    try:
        str(expanded_path).encode()
    except UnicodeEncodeError:
        raise CascadeError(f"{expanded_path}: its name is not UTF-8; rename it, or name another folder") from None
    return expanded_path


def path_of(path: str | Path) -> Path:
    """`expanded`, as a path."""
    return Path(expanded(str(path)))
