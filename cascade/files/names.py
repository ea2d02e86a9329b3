"""Names of files that every operating system and cloud folder takes."""

from __future__ import annotations

import re
import unicodedata

_NOT_EVERYWHERE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
"""Devices on Windows, whatever ending follows. Source: "Naming Files, Paths, and Namespaces", Microsoft."""


def portable(stem: str) -> str:
    """A name without its ending, with `_` in place of what some system does not take; never empty."""
    name = _NOT_EVERYWHERE.sub("_", stem).rstrip(". ")
    return f"_{name}" if not name or _RESERVED.fullmatch(name) else name


def alike(name: str) -> str:
    """The same for two names that are one file on some system: they differ in case, or in how accents are coded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
