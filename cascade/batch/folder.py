"""An output folder: the files that each shard has, and whether an earlier run in it can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from cascade import system
from cascade.batch.manifest import Manifest
from cascade.batch.metadata import sidecar
from cascade.errors import CascadeError
from cascade.files.atomic import read_json
from cascade.files.paths import is_within
from cascade.files.text import check_regular
from cascade.pictures.finish import Finish
from cascade.seeds import MAX_SEED, fresh_seed
from cascade.settings import Noted, parse

# --- layout ----------------------------------------------------------------------------------------------------------
# The layout of an output folder: picture format, and names of the files that each shard has.

WEBDATASET = "webdataset"


@dataclass(frozen=True)
class Layout:
    """The storage format of the output.

    format: png, webp, jpeg, tiff, npy, or webdataset: tar shards of `tar_size` prompts. shard: (number, count).
    finish: what is done to pictures before they are written. member: format of the pictures in tars.
    """

    format: str = "png"
    tar_size: int = 1000
    shard: tuple[int, int] = (0, 1)
    finish: Finish = field(default_factory=Finish)
    member: str = "png"

    @property
    def in_tars(self) -> bool:
        """Whether pictures are stored in tars."""
        return self.format == WEBDATASET

    @property
    def picture_format(self) -> str:
        """Format of each picture file."""
        return self.member if self.in_tars else self.format

    def named(self, stem: str, ending: str = "") -> str:
        """The name of a file that each shard has: `manifest.jsonl`, or `manifest-00003-of-00016.jsonl`."""
        which, count = self.shard
        middle = f"-{which:05d}-of-{count:05d}" if count > 1 else ""
        return f"{stem}{middle}{ending}"


# --- the earlier run -------------------------------------------------------------------------------------------------
# The earlier run in an output folder: whether it can be continued, and its removal.

RUN = "run.json"
STATE = ".cascade"
MADE_BY, PROGRAM = "made_by", "cascade generate"
"""The entry of run.json that marks it as a run of cascade."""
_OF_A_RUN = {"versions", "model", "seed"}
"""Entries of every run.json from before that mark existed."""


class _Run(Noted):
    """The entries of run.json that are read one by one; all are compared when a run is continued."""

    versions: str = ""
    model: str = ""
    dtype: str | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)


class EarlierRun:
    """The earlier run in a folder, if any."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout

    def settings(self) -> dict[str, Any] | None:
        """The settings of the run, or None. Raises CascadeError for a run.json that another program wrote."""
        path = self._folder / RUN
        if not path.exists():
            return None
        content = read_json(path)
        parse(_Run, content, str(path))
        if content.pop(MADE_BY, None) != PROGRAM and not content.keys() >= _OF_A_RUN:
            raise CascadeError(f"{path}: not written by `cascade generate`; name another folder with --out")
        return content

    def is_foreign(self) -> bool:
        """Whether the folder has a manifest, but no record of how its pictures were drawn."""
        return (self._folder / self._layout.named("manifest", ".jsonl")).exists() and self.settings() is None

    def check_foreign_files(self, extras: Iterable[tuple[str, str]], overwrite: bool) -> None:
        """Raises CascadeError for files that the new run would replace or extend and that no earlier run wrote.

        extras: additional files that the new run will write, as (stem, ending). overwrite: whether the earlier run will
        be removed; files that it did not write are kept even then.
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
            raise foreign_file(failures)
        for name in extras:
            self.check_made(*name)

    def check_made(self, stem: str, ending: str) -> None:
        """Raises CascadeError if this additional file exists and no earlier run wrote it."""
        path = self._folder / self._layout.named(stem, ending)
        if path.exists() and path.name not in self._made():
            raise foreign_file(path)

    def note_made(self, stem: str, ending: str) -> None:
        """Record that the run is about to write or replace an additional file, which belongs to it from now on."""
        self.check_made(stem, ending)
        with check_regular(self._note).open("a", encoding="utf-8") as file:
            file.write(f"{self._layout.named(stem, ending)}\n")

    def _made(self) -> set[str]:
        """Names of additional files that runs wrote."""
        if not self._note.exists():
            return set()
        return set(check_regular(self._note).read_text(encoding="utf-8", errors="surrogateescape").split())

    @property
    def _note(self) -> Path:
        return self._folder / STATE / self._layout.named("made")

    def _check_manifest(self) -> None:
        """Raises CascadeError for a manifest that `cascade generate` did not write; called if nothing else vouches."""
        path = self._folder / self._layout.named("manifest", ".jsonl")
        manifest = Manifest(path)
        try:
            manifest.refresh()
            if manifest.spoilt:
                raise CascadeError(f"{path}: not a manifest of `cascade generate`; name another folder")
        finally:
            manifest.close()

    def has_pictures(self) -> bool:
        """Whether any shard wrote a picture; until then the settings may still change."""
        return any(path.stat().st_size for path in self._folder.glob("manifest*.jsonl"))

    def continued(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings`, with the seed of this run if they have none. Raises CascadeError when any other differs."""
        earlier = self.settings()
        plain = with_seed(settings, earlier)
        if earlier is None or earlier == plain:
            return plain
        changed = [name for name in {**earlier, **plain} if earlier.get(name) != plain.get(name)]
        differences = "; ".join(
            f"{name} was {_as_text(earlier.get(name))}, is {_as_text(plain.get(name))}" for name in changed
        )
        raise CascadeError(
            f"{self._folder}: holds a run with other settings ({differences}); use the same, name another folder,"
            " or --overwrite"
        )

    def remove(self) -> None:
        """Remove the files in the manifest, additional files and the manifest; no other files. Raises OSError.

        The manifest goes first, whole, so that no line is left without its picture. It is renamed: after a failure or a
        kill the next run reads in it which files are still to be removed.
        """
        self.finish_removal()
        path = self._folder / self._layout.named("manifest", ".jsonl")
        if path.exists():
            system.replace(path, self._going)
        self.finish_removal()

    def finish_removal(self) -> None:
        """Remove the files of a run whose manifest was renamed for that, if there is one. Raises OSError."""
        if not self._going.exists():
            return
        for name in self._made():
            self._remove_file(name)
        self._note.unlink(missing_ok=True)
        manifest = Manifest(self._going)
        try:
            manifest.refresh()
            for entry in manifest.entries():
                for name in (*entry.get("stages", {}).values(), sidecar(entry["file"]), entry["file"]):
                    self._remove_file(name)
        finally:
            manifest.close()
        self._going.unlink()

    @property
    def _going(self) -> Path:
        return self._folder / STATE / self._layout.named("going", ".jsonl")

    def _remove_file(self, name: str) -> None:
        """Remove a file that the manifest names; for a member of a tar, the tar."""
        path = self._folder / (name.partition("/")[0] if ".tar/" in name else name)
        if is_within(path, self._folder) and not path.is_dir():
            path.unlink(missing_ok=True)


def foreign_file(path: Path) -> CascadeError:
    """The error for a file that would be replaced although no run wrote it."""
    return CascadeError(f"{path}: exists, but no run wrote it; move it, or name another folder with --out")


def with_seed(settings: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings as read back from JSON, with a seed: their own, that of the earlier run, or a new one."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if isinstance(plain.get("dtype"), dict):
        plain["dtype"] = (earlier or {}).get("dtype") or plain["dtype"]["auto"]
    if plain.get("seed") is None:
        known = (earlier or {}).get("seed")
        plain["seed"] = fresh_seed() if known is None else known
    return plain


def _as_text(value: Any) -> str:
    return "not given" if value is None else os.fsdecode(json.dumps(value, ensure_ascii=False))[:80]
