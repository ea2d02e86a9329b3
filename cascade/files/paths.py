"""The names and places of files: paths, patterns, folders, names that are valid everywhere, variants of weights."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
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


# --- names -----------------------------------------------------------------------------------------------------------
# File names that every operating system and cloud folder accepts.

_NOT_EVERYWHERE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
"""Windows device names, with any ending. Source: "Naming Files, Paths, and Namespaces", Microsoft."""


def portable(stem: str) -> str:
    """A name without ending, with `_` for characters that some system does not accept; never empty."""
    name = _NOT_EVERYWHERE.sub("_", stem).rstrip(". ")
    return f"_{name}" if not name or _RESERVED.fullmatch(name) else name


def alike(name: str) -> str:
    """A key, equal for names that are one file on some system: they differ in case, or in how accents are coded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# --- patterns --------------------------------------------------------------------------------------------------------
# Glob patterns in paths: `*`, `?`, `[...]` and `**`, unless a file or folder has exactly that name.


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


# --- variants --------------------------------------------------------------------------------------------------------
# Weights that a folder holds in several precisions, as on the hub: only one precision is read.

HALVES = ("bf16", "fp16")
"""The part of a file's name between dots that marks half precision; the preferred one first."""


def one_variant(files: Iterable[Path]) -> list[Path]:
    """The files in full precision; if there are none, those of one half precision."""
    files = list(files)
    by_variant = {variant: [file for file in files if variant_of(file) == variant] for variant in (None, *HALVES)}
    return next((found for found in by_variant.values() if found), [])


def variant_of(file: Path) -> str | None:
    """`bf16` or `fp16`, from the file's name; None: full precision."""
    return next((variant for variant in HALVES if f".{variant}" in file.name), None)


# --- folders ---------------------------------------------------------------------------------------------------------
# The user's files in a folder and its subfolders, without those that systems and editors leave there.


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
