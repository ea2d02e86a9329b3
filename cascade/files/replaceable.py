"""Single files that a command writes and may write again: what is there is replaced if a command of ours made it."""

from __future__ import annotations

from pathlib import Path

from cascade.errors import CascadeError
from cascade.files.picture import open_picture

SOFTWARE = "Software"
"""Of PNG's texts the one that says what wrote it."""


def check_png(path: Path, program: str) -> None:
    """Raises CascadeError for a file that is there, unless it is a PNG that `program` wrote."""
    if not path.exists():
        return
    said = None
    try:
        with open_picture(path, limited=False) as image:
            said = image.info.get(SOFTWARE)
    except (OSError, ValueError, SyntaxError):
        pass
    if said != program:
        raise CascadeError(f"{path}: is there already, and `{program}` did not write it; name another file")
