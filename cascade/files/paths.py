"""Expansion of paths that no shell has expanded: in settings, after `--out=`, in Python."""

from __future__ import annotations

import os
from pathlib import Path

from cascade.errors import CascadeError


def expanded(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder, as a shell does.

    Otherwise a folder named `~` would be created, and a user might later delete `~`, the home folder. Raises
    CascadeError for a user whose home is unknown, unless a file or folder has exactly this name.
    """
    if not path.startswith("~"):
        return path
    home = os.path.expanduser(path)  # noqa: PTH111 - Path's own raises RuntimeError
    if home.startswith("~") and not os.path.lexists(path):
        user = path.partition("/")[0]
        raise CascadeError(f"{path}: the home folder of {user} is not known; if that is its name, write ./{path}")
    return home


def plain_path(path: str | Path) -> Path:
    """`path_of` for libraries written in Rust, which need UTF-8. Raises CascadeError for another encoding."""
    expanded_path = path_of(path)
    try:
        str(expanded_path).encode()
    except UnicodeEncodeError:
        raise CascadeError(f"{expanded_path}: its name is not UTF-8; rename it, or name another folder") from None
    return expanded_path


def path_of(path: str | Path) -> Path:
    """`expanded`, as a Path."""
    return Path(expanded(str(path)))


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, links followed; one that leads in a circle leads nowhere."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False
