"""The user's files in a folder and its subfolders, without those that systems and editors leave there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Walk:
    """The result of a walk.

    others: pipes, devices and broken links. problems: a line for each of these, and for each folder or file that cannot
    be read, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Whether a part of a relative path begins with a dot: `.ipynb_checkpoints`, `.Trash-1000`, `._x.png` of a Mac."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def walk(folder: Path) -> Walk:
    """The files of a folder and its subfolders, sorted, without hidden ones.

    Links to folders are followed, and each folder is entered once, so that cycles end. Files of a linked folder have
    its own path if that is below `folder`, else the path of the first link. Raises OSError for `folder` itself.
    """
    found = Walk()
    entered = {_identity(folder)}
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        here = folders.popleft() if folders else links.popleft()
        if here != folder and _is_known(here, entered, found):
            continue
        try:
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if here == folder:
                raise
            found.problems.append(_problem(here, error))
            continue
        _sort_out(entries, found, folders, links)
    found.files.sort()
    return found


def _sort_out(entries: Iterable[os.DirEntry[str]], found: Walk, folders: deque[Path], links: deque[Path]) -> None:
    """Add each entry of a folder to the right list."""
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path = Path(entry.path)
        try:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                found.files.append(path)
            else:
                found.others.append(path)
                found.problems.append(_problem(path, "a broken link" if entry.is_symlink() else "not a file"))
        except OSError as error:  # a cycle of links
            found.problems.append(_problem(path, error))


def _is_known(folder: Path, entered: set[tuple[int, int]], found: Walk) -> bool:
    """Whether a folder was entered under another name, or cannot be read; marks it as entered."""
    try:
        identity = _identity(folder)
    except OSError as error:
        found.problems.append(_problem(folder, error))
        return True
    known = identity in entered
    entered.add(identity)
    return known


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _problem(path: Path, reason: OSError | str) -> str:
    return f"{path}: cannot be read: {reason if isinstance(reason, str) else reason.strerror or reason}"
