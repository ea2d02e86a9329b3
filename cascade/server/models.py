"""Models to choose from: the one that the server began with, and those in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cascade.errors import CascadeError
from cascade.load.index import find_model
from cascade.pipeline import CascadePipeline
from cascade.quoting import quoted

Load = Callable[[str | None], CascadePipeline]
SIGN = "cascade.json"
BUNDLED = "bundled"


class Models:
    """A model is named by its folder's name; a request that names another one reaches no disk."""

    def __init__(self, load: Load, first: str | None = None, folder: Path | None = None) -> None:
        """load: from a folder or hub id, None: the bundled one. folder: whose subfolders are models, too."""
        self._load, self._first, self._folder = load, first, folder
        self.current = BUNDLED if first is None else Path(first).name or first

    def names(self) -> list[str]:
        """All of them, the one in use first."""
        return [self.current, *(name for name in self._places() if name != self.current)]

    def choose(self, name: str) -> Callable[[], CascadePipeline]:
        """Make a model the current one; what loads it. Raises CascadeError for one that is not there."""
        places = self._places()
        if name not in places:
            raise CascadeError(f"name: {quoted(name)}; expected one of {', '.join(map(quoted, places))}")
        self.current = name
        return lambda: self._load(places[name])

    def card(self) -> Path | None:
        """The folder of the current model's card."""
        return find_model(self._places()[self.current])

    def _places(self) -> dict[str, str | None]:
        found: dict[str, str | None] = (
            {} if self._first is None else {Path(self._first).name or self._first: self._first}
        )
        for path in sorted(self._folder.iterdir()) if self._folder is not None and self._folder.is_dir() else ():
            if (path / SIGN).is_file():
                found.setdefault(path.name, str(path))
        return {**found, BUNDLED: None} if BUNDLED not in found else found
