"""Traces requested by clients: folders by name, of which the newest are kept."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from cascade.batch.plan import Target
from cascade.drawing.trace import Recorder
from cascade.drawing.trace_files import ANIMATION, SHEET, read_trace, write_trace
from cascade.pipeline import CascadePipeline

MOST = 30
"""Number of kept traces of 5 to 20 MB each."""


class Traces:
    """A folder of traces. Only requested names of 32 hexadecimal digits reach the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, target: Target, recorder: Recorder, pipeline: CascadePipeline) -> str:
        """Store a trace; returns its name, derived from the model and the recipe. Raises OSError."""
        digest = target.recipe.digest()
        name = hashlib.sha256(f"{pipeline.name} {digest}".encode()).hexdigest()[:32]
        recipe = target.recipe
        said = {"prompt": recipe.prompt, "seed": str(recipe.seed), "model": pipeline.name, "license": pipeline.license}
        write_trace(self._folder / name, recorder, said)
        for old in sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-MOST]:
            shutil.rmtree(old, ignore_errors=True)
        return name

    def get(self, name: str) -> dict[str, Any]:
        """The content of trace.json. Raises KeyError."""
        try:
            found: dict[str, Any] = read_trace(self._place(name))
        except (OSError, ValueError):
            raise KeyError(name) from None
        return found

    def file(self, name: str, file: str) -> bytes:
        """A picture listed in a trace. Raises KeyError."""
        steps = [step for stage in self.get(name)["stages"] for step in stage["steps"]]
        if file not in {SHEET, ANIMATION, *(own for step in steps for own in step["files"].values())}:
            raise KeyError(file)
        try:
            return (self._place(name) / file).read_bytes()
        except OSError:
            raise KeyError(file) from None

    def _place(self, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise KeyError(name)
        return self._folder / name
