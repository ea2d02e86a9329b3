"""Hooks of mkdocs: the Python reference is made from docstrings, links to files outside docs/ become their paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import cascade

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)[^)]*\)")
_FIRST = (
    "CascadePipeline",
    "CascadeOutput",
    "generate_files",
    "Stage",
    "TextEncoder",
    "Conditioning",
    "TextEmbeddings",
)
"""Public names in the order in which a reader meets them; the others follow by the alphabet."""
_ABOUT = """# Python

All public names, from their docstrings: those of `cascade`, then the mathematics in `cascade.diffusion`, whose formulas
[mathematics.md](mathematics.md) derives. Values of pictures are in [-1, 1], shapes (batch, channels, height, width),
and times run from 0, the picture, to 1, noise.
"""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the page `python.md`, which no file of docs/ holds, so that it cannot differ from the code."""
    files.append(File.generated(config, "python.md", content=reference()))
    return files


def reference() -> str:
    """The page's Markdown: a directive of mkdocstrings for each public name, then for each module of mathematics."""
    names = [*_FIRST, *(name for name in cascade.__all__ if name not in _FIRST and name != "__version__")]
    folder = Path(cascade.__file__).parent / "diffusion"
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    blocks = [_ABOUT, "## cascade\n", *(f"::: cascade.{name}\n" for name in names), "## cascade.diffusion\n"]
    return "\n".join([*blocks, *(f"::: cascade.diffusion.{name}\n" for name in modules)])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[the card](../cascade/pretrained/README.md)` -> the card (`cascade/pretrained/README.md`)."""
    return _OUTSIDE.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    text, path = link[1], link[2]
    return f"`{path}`" if text.strip("`") in (path, path.rpartition("/")[2]) else f"{text} (`{path}`)"
