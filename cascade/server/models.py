"""The available models: the server's first model, and the models in a folder."""

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
    """Models by the name of their folder; an unknown name in a request does not reach the disk."""

    def __init__(self, load: Load, first: str | None = None, folder: Path | None = None) -> None:
        """load: loads a folder or hub id, None: the bundled model. folder: its subfolders are further models."""
        self._load, self._first, self._folder = load, first, folder
        self.current = BUNDLED if first is None else Path(first).name or first

    def names(self) -> list[str]:
        """Names of all models, the current one first."""
        return [self.current, *(name for name in self._places() if name != self.current)]

    def choose(self, name: str) -> Callable[[], CascadePipeline]:
        """Make a model the current one; returns the function that loads it. Raises CascadeError for an unknown name."""
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
