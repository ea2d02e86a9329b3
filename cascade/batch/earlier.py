"""What an earlier run left in a folder: whether it can be continued, and what is removed when it is not to be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
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
STATE = ".cascade"
MADE_BY, PROGRAM = "made_by", "cascade generate"
"""What says in a run.json that it is ours."""
_OF_A_RUN = {"versions", "model", "seed"}
"""What every one has that was written before it said so."""


class EarlierRun:
    """The run that a folder holds, if any."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout

    def settings(self) -> dict[str, Any] | None:
        """Those that it ran with. Raises CascadeError for a run.json of somebody else."""
        path = self._folder / RUN
        if not path.exists():
            return None
        said = read_json(path)
        if said.pop(MADE_BY, None) != PROGRAM and not said.keys() >= _OF_A_RUN:
            raise CascadeError(f"{path}: is not of a run of `cascade generate`; name another folder with --out")
        return said

    def is_foreign(self) -> bool:
        """Whether there is a manifest, and nothing that says how its pictures were made."""
        return (self._folder / self._layout.named("manifest", ".jsonl")).exists() and self.settings() is None

    def check_strangers(self, extras: Iterable[tuple[str, str]], overwrite: bool) -> None:
        """Raises CascadeError for what a run would replace or add to, and that no run of ours made.

        extras: files beside the pictures that will be written, as (stem, ending). overwrite: whether the run that
        stands here is to go; what it did not make stays even then.
        """
        ours = self.settings() is not None
        if self.is_foreign() and not overwrite:
            raise CascadeError(
                f"{self._folder}: holds the pictures of an earlier run; name another folder, or --overwrite"
            )
        if self.is_foreign():
            self._check_manifest()
        failures = self._folder / self._layout.named("failures", ".jsonl")
        if failures.exists() and not ours:
            raise not_ours(failures)
        for name in extras:
            self.check_made(*name)

    def check_made(self, stem: str, ending: str) -> None:
        """Raises CascadeError for a file beside the pictures that no run of ours wrote here."""
        path = self._folder / self._layout.named(stem, ending)
        if path.exists() and path.name not in self._made():
            raise not_ours(path)

    def note_made(self, stem: str, ending: str) -> None:
        """A file beside the pictures is about to be written, or replaced, and is ours from now on."""
        self.check_made(stem, ending)
        with self._note.open("a", encoding="utf-8") as file:
            file.write(f"{self._layout.named(stem, ending)}\n")

    def _made(self) -> set[str]:
        """Names of files beside the pictures that runs wrote."""
        return set(self._note.read_text(encoding="utf-8").split()) if self._note.exists() else set()

    @property
    def _note(self) -> Path:
        return self._folder / STATE / self._layout.named("made")

    def _check_manifest(self) -> None:
        """Raises CascadeError for a manifest that is not ours; one that nothing else of ours stands beside."""
        path = self._folder / self._layout.named("manifest", ".jsonl")
        manifest = Manifest(path)
        try:
            manifest.refresh()
        except CascadeError:
            raise CascadeError(f"{path}: no manifest of `cascade generate`; name another folder with --out") from None
        finally:
            manifest.close()

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
        for name in self._made():
            self._remove_file(name)
        self._note.unlink(missing_ok=True)
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


def not_ours(path: Path) -> CascadeError:
    """What is said of a file that would be replaced, and that no run made."""
    return CascadeError(f"{path}: is there already, and not of a run; move it, or name another folder with --out")


def with_seed(settings: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings as JSON would give them back, with a seed: their own, that of the earlier run, or a new one."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if isinstance(plain.get("dtype"), dict):
        plain["dtype"] = plain["dtype"]["auto"] if earlier is None else earlier["dtype"]
    if plain.get("seed") is None:
        plain["seed"] = fresh_seed() if earlier is None else earlier["seed"]
    return plain


def _told(value: Any) -> str:
    return "not given" if value is None else os.fsdecode(json.dumps(value, ensure_ascii=False))[:80]
