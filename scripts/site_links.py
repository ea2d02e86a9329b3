"""A hook of mkdocs: links to files outside docs/ become their paths, since the site holds the documentation alone."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[the card](../cascade/pretrained/README.md)` -> the card (`cascade/pretrained/README.md`)."""
    return _OUTSIDE.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    text, path = link[1], link[2]
    return f"`{path}`" if text.strip("`") in (path, path.rpartition("/")[2]) else f"{text} (`{path}`)"
