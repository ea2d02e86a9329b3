"""Single files that a command writes: an existing file is replaced only if the same command wrote it."""

from __future__ import annotations

from pathlib import Path

from cascade.errors import CascadeError
from cascade.files.picture import open_picture

SOFTWARE = "Software"
"""The PNG text entry that names the program that wrote the file."""


def check_png(path: Path, program: str) -> None:
    """Raises CascadeError for an existing file, unless it is a PNG that `program` wrote."""
    if not path.exists():
        return
    writer = None
    try:
        with open_picture(path, limited=False) as image:
            writer = image.info.get(SOFTWARE)
    except (OSError, ValueError, SyntaxError):
        pass
    if writer != program:
        raise CascadeError(f"{path}: exists, and `{program}` did not write it; name another file")
