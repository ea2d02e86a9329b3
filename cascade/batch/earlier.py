"""What an earlier run left in a folder: whether it can be continued, and what is removed when it is not to be."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cascade.batch.layout import Layout
from cascade.batch.manifest import Manifest
from cascade.batch.metadata import sidecar
from cascade.checkpoint import read_json
from cascade.errors import CascadeError
from cascade.seeds import fresh_seed

RUN = "run.json"
_MADE_OF_IT = (("manifest", ".parquet"), ("index", ".html"), ("grid", ".png"))


class EarlierRun:
    """The run that a folder holds, if any."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout

    def settings(self) -> dict[str, Any] | None:
        """Those that it ran with."""
        path = self._folder / RUN
        return read_json(path) if path.exists() else None

    def is_foreign(self) -> bool:
        """Whether there is a manifest, and nothing that says how its pictures were made."""
        return (self._folder / self._layout.named("manifest", ".jsonl")).exists() and self.settings() is None

    def has_pictures(self) -> bool:
        """Whether any shard wrote one; settings of a run without pictures bind nobody."""
        return any(path.stat().st_size for path in self._folder.glob("manifest*.jsonl"))

    def continued(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings`, with the seed of this run if they have none. Raises CascadeError when any other differs."""
        earlier = self.settings()
        plain = with_seed(settings, earlier)
        if earlier is None or earlier == plain:
            return plain
        changed = [name for name in {**earlier, **plain} if earlier.get(name) != plain.get(name)]
        told = "; ".join(f"{name} was {_told(earlier.get(name))}, is {_told(plain.get(name))}" for name in changed)
        raise CascadeError(
            f"{self._folder}: holds a run with other settings ({told}); use the same, name another folder,"
            " or --overwrite"
        )

    def remove(self) -> None:
        """Remove what the manifest names, what was made of it, and the manifest; nothing that is not of the run."""
        for stem, ending in _MADE_OF_IT:
            (self._folder / self._layout.named(stem, ending)).unlink(missing_ok=True)
        path = self._folder / self._layout.named("manifest", ".jsonl")
        if not path.exists():
            return
        with suppress(CascadeError):  # a file that is no manifest of ours names nothing
            manifest = Manifest(path)
            manifest.refresh()
            for entry in manifest.entries():
                for name in (entry["file"], sidecar(entry["file"]), *entry.get("stages", {}).values()):
                    self._remove_file(name)
            manifest.close()
        path.unlink()

    def _remove_file(self, name: str) -> None:
        """A file of the manifest; of a member of a tar, the tar."""
        path = self._folder / (name.partition("/")[0] if ".tar/" in name else name)
        if path.resolve().is_relative_to(self._folder.resolve()):
            path.unlink(missing_ok=True)


def with_seed(settings: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings as JSON would give them back, with a seed: their own, that of the earlier run, or a new one."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if plain.get("seed") is None:
        plain["seed"] = fresh_seed() if earlier is None else earlier["seed"]
    return plain


def _told(value: Any) -> str:
    return "not given" if value is None else os.fsdecode(json.dumps(value, ensure_ascii=False))[:80]
