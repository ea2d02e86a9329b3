"""File names that every operating system and cloud folder accepts."""

from __future__ import annotations

import re
import unicodedata

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
