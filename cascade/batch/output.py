"""An output folder: pictures, the manifest that names every finished one, and what lets a later run continue."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from cascade.batch.engine import Drawn
from cascade.batch.locks import Claims, RunLock, processes
from cascade.batch.manifest import Manifest, what_made
from cascade.batch.metadata import FORMATS, encode, sidecar
from cascade.batch.stores import FolderStore, Store, TarStore, sha256
from cascade.checkpoint import read_json
from cascade.errors import CascadeError
from cascade.images import contact_sheet
from cascade.prompts import Failure
from cascade.seeds import fresh_seed

STATE = ".cascade"
RUN = "run.json"
GRID_CELL = 256
"""Largest width of a picture on the contact sheet."""
GRID_PICTURES = 100
"""Pictures on the contact sheet, which shows the first ones."""
WEBDATASET = "webdataset"
_OF_THE_FILE = ("file", "stages", "sha256", "seconds")


@dataclass(frozen=True)
class Layout:
    """How the output is stored.

    format: png, webp, jpeg, or webdataset: PNG in tar shards of `tar_size` prompts. shard: (which, of how many).
    """

    format: str = "png"
    tar_size: int = 1000
    shard: tuple[int, int] = (0, 1)

    @property
    def picture_format(self) -> str:
        """Of the single pictures."""
        return "png" if self.format == WEBDATASET else self.format

    def named(self, stem: str, ending: str) -> str:
        """A file of which each shard has its own: `manifest.jsonl`, or `manifest-00003-of-00016.jsonl`."""
        which, count = self.shard
        middle = f"-{which:05d}-of-{count:05d}" if count > 1 else ""
        return f"{stem}{middle}{ending}"


class Output:
    """The folder of a run. `begin` takes the lock; the lock ends with the process."""

    def __init__(self, folder: str | Path, layout: Layout | None = None, *, overwrite: bool = False) -> None:
        """Raises CascadeError when the folder cannot be written, or holds pictures of something else.

        overwrite: begin anew; the pictures of the earlier run are removed.
        """
        self.folder, self.layout, self._overwrite = Path(folder), layout or Layout(), overwrite
        self.rank, self.process_count, self._launch = processes()
        self._state = self.folder / STATE
        self._spool = self._state / self._named("spool", "")
        self._temporary = self._state / self._named("temporary", "")
        self._store: Store = FolderStore(self.folder, self._temporary)
        if self.layout.format == WEBDATASET:
            self._store = TarStore(self.folder, self._spool, self._temporary, self.layout.tar_size)
        self._lock: RunLock | None = None
        self._claims: Claims | None = None
        self._drawing: Claims | None = None
        self._manifest: Manifest | None = None
        if (self.folder / self._named("manifest", ".jsonl")).exists() and not overwrite and self.earlier() is None:
            raise self._occupied()
        self._made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # better to know now than after the first picture
        except OSError as error:
            raise self._unwritable(error) from None

    # --- beginning and end

    def earlier(self) -> dict[str, Any] | None:
        """The settings of the run that this folder holds, if any."""
        path = self.folder / RUN
        return read_json(path) if path.exists() else None

    def begin(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Take the folder, or continue in it. settings: what must be the same when a run is continued.

        Returns them with a seed: where it is None, that of the run that stands here, or a new one.

        Raises CascadeError when another run writes here, or the run that stands here had other settings.
        """
        try:
            self._state.mkdir(exist_ok=True)
            self._lock = RunLock(self._state / self._named("lock", ""), self._launch)
            self._lock.acquire()
            self._claims = Claims(self._state / self._named("claims", ""))
            if self._lock.first:
                settled = self._prepare(settings)
                self._claims.clear()
                self._lock.share()
            else:
                settled = self._compared(settings)
            self._drawing = Claims(self._state / self._named("drawing", ""))
        except OSError as error:
            raise self._unwritable(error) from None
        self._drawing.take(self.rank)
        self._manifest = Manifest(self.folder / self._named("manifest", ".jsonl"))
        self._manifest.refresh()
        return settled

    def _prepare(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if self._overwrite:
            self._clear()
            settled = _with_seed(settings, None)
        else:
            settled = self._compared(settings)
        if self.earlier() != settled:
            shutil.rmtree(self.shelf, ignore_errors=True)  # smaller pictures of other settings, or of another model
        shutil.rmtree(self._temporary, ignore_errors=True)  # what a killed run had half-written
        self._temporary.mkdir()
        (self.folder / self._named("failures", ".jsonl")).unlink(missing_ok=True)
        self.write_file(RUN, (json.dumps(settled, indent=2, ensure_ascii=False) + "\n").encode())
        return settled

    def _compared(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        earlier = self.earlier() if self._holds_pictures() or not self._is_first() else None
        plain = _with_seed(settings, earlier)
        if earlier is None or earlier == plain:
            return plain
        changed = [name for name in {**earlier, **plain} if earlier.get(name) != plain.get(name)]
        told = "; ".join(f"{name} was {_told(earlier.get(name))}, is {_told(plain.get(name))}" for name in changed)
        raise CascadeError(
            f"{self.folder}: holds a run with other settings ({told}); use the same, name another folder,"
            " or --overwrite"
        )

    def _is_first(self) -> bool:
        return self._lock is None or self._lock.first

    def _holds_pictures(self) -> bool:
        """Whether any shard wrote one; settings of a run without pictures bind nobody."""
        return any(path.stat().st_size for path in self.folder.glob("manifest*.jsonl"))

    def _clear(self) -> None:
        """Remove what the earlier manifest names, what was made of it, and the manifest."""
        for name in ("manifest.parquet", "index.html", "grid.png"):
            stem, _, ending = name.partition(".")
            (self.folder / self._named(stem, f".{ending}")).unlink(missing_ok=True)
        path = self.folder / self._named("manifest", ".jsonl")
        if path.exists():
            with suppress(CascadeError):  # a file that is no manifest of ours names nothing
                manifest = Manifest(path)
                manifest.refresh()
                for entry in manifest.entries():
                    for name in (entry["file"], sidecar(entry["file"]), *entry.get("stages", {}).values()):
                        path_of = self.folder / (name.partition("/")[0] if ".tar/" in name else name)
                        if path_of.resolve().is_relative_to(self.folder.resolve()):
                            path_of.unlink(missing_ok=True)
                manifest.close()
            path.unlink()
        shutil.rmtree(self._spool, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of everything; a folder that was made for nothing goes again."""
        nothing = self._manifest is None or self._manifest.is_empty()
        for part in (self._manifest, self._claims, self._drawing):
            if part is not None:
                part.close()
        if nothing and self._made and self.rank == 0:
            for name in (RUN, self._named("manifest", ".jsonl"), self._named("failures", ".jsonl")):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self._state, ignore_errors=True)
            with suppress(OSError):  # not empty
                self.folder.rmdir()
        if self._lock is not None:
            self._lock.close()

    # --- while it runs

    @property
    def manifest(self) -> Manifest:
        """Open from `begin` on."""
        assert self._manifest is not None, "begin() comes first"
        return self._manifest

    @property
    def shelf(self) -> Path:
        """Where smaller pictures wait, when memory is short."""
        return self._state / self._named("shelf", "")

    def owns(self, index: int) -> bool:
        """Whether a line belongs to this shard."""
        which, count = self.layout.shard
        unit = self._store.unit(index)
        return (index if unit is None else unit) % count == which

    def unit(self, index: int) -> int | None:
        """To which tar a prompt belongs; None: prompts are on their own."""
        return self._store.unit(index)

    def claim(self, unit: int) -> bool:
        """Whether this process may draw a unit. With several it is whoever comes first."""
        if self.process_count == 1:
            return True
        assert self._claims is not None, "begin() comes first"
        if not self._claims.take(unit):
            return False
        if self._claims.is_done(unit):  # its failures are written down, and its pictures need no second look
            self._claims.release(unit)
            return False
        self.manifest.refresh()  # another one may have died within it
        return True

    def has(self, index: int, number: int, made_by: Mapping[str, Any]) -> bool:
        """Whether a picture is finished, its file whole. Raises CascadeError when it was of another prompt."""
        known = self.manifest.find(index, number)
        if known is None:
            return False
        if what_made(known) != what_made(made_by):
            raise CascadeError(
                f"{self.folder}: {known['file']} was drawn from another prompt, seed or settings than prompt {index}"
                " of this run; name another folder with --out, or --overwrite"
            )
        content = self._store.read(known["file"])
        whole = content is not None and sha256(content) == known["sha256"]
        there = all(self._store.read(name) is not None for name in known.get("stages", {}).values())
        return whole and there and all(self._store.read(name) == text for name, text in self._companions(known).items())

    def _companions(self, line: Mapping[str, Any]) -> dict[str, bytes]:
        """What stands beside a picture in a tar: its line of the manifest without times and names, and its prompt."""
        if self.layout.format != WEBDATASET:
            return {}
        stem = str(line["file"]).rpartition(".")[0]
        entry = {name: value for name, value in line.items() if name not in _OF_THE_FILE}
        return {f"{stem}.json": json.dumps(entry).encode(), f"{stem}.txt": line["prompt"].encode()}

    def write(self, drawn: Drawn, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Write the picture whole, then its line of the manifest, which it returns."""
        task, ending = drawn.task, FORMATS[self.layout.picture_format]
        index, count = task.job.record.index, task.job.num_images
        files: dict[str, bytes] = {}
        kept: dict[str, str] = {}
        *smaller, largest = sorted(drawn.stages)
        for resolution in smaller:
            kept[str(resolution)] = self._stage_name(index, task.stem, resolution, ending, count)
            files[kept[str(resolution)]] = encode(drawn.stages[resolution], entry, self.layout.picture_format)[0]
        file = self._store.name(index, task.stem, ending, count)
        content, beside = encode(drawn.stages[largest], entry, self.layout.picture_format)
        if beside is not None:
            files[sidecar(file)] = beside
        files |= self._companions({**entry, "file": file})
        files[file] = content  # last: if it is there, the others are
        try:
            self._store.write(files)
        except OSError as error:
            raise self._unwritable(error) from None
        stages = {"stages": kept} if kept else {}
        line = {**entry, "file": file, **stages, "sha256": sha256(content), "seconds": round(drawn.seconds, 3)}
        self.manifest.append(line)
        return line

    def _stage_name(self, index: int, stem: str, resolution: int, ending: str, count: int) -> str:
        if self.layout.format == WEBDATASET:
            return self._store.name(index, stem, f"{resolution}.{ending}", count)
        return "stages/" + self._store.name(index, f"{stem}-{resolution}", ending, count)

    def fail(self, failure: Failure, **more: Any) -> None:
        """Write down what could not be drawn."""
        line = {"origin": failure.origin, "index": failure.index, "reason": failure.reason, **more}
        try:
            with (self.folder / self._named("failures", ".jsonl")).open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self, unit: int) -> None:
        """All pictures of a unit are written: pack it, and let others see."""
        try:
            if self._store.unit(0) is not None:
                self._store.finish(unit)
        except OSError as error:
            raise self._unwritable(error) from None
        if self.process_count > 1 and self._claims is not None:
            self._claims.finish(unit)

    def wait_for_the_others(self) -> None:
        """Until no process of this launch draws any more: launchers end all when one ends with a failure."""
        assert self._drawing is not None, "begin() comes first"
        self._drawing.release(self.rank)
        for rank in range(self.process_count):
            if rank != self.rank:
                self._drawing.wait(rank)

    def is_everything_done(self, last: int) -> bool:
        """Whether processes of this launch finished all units to `last`; one that was told to stop left its own."""
        assert self._claims is not None, "begin() comes first"
        which, count = self.layout.shard if self._store.unit(0) is not None else (0, 1)
        return self.process_count == 1 or all(map(self._claims.is_done, range(which, last + 1, count)))

    def failures(self) -> int:
        """How many failures all processes wrote down."""
        path = self.folder / self._named("failures", ".jsonl")
        if not path.exists():
            return 0
        with path.open("rb") as file:
            return sum(1 for _ in file)

    # --- after it

    def complete(self) -> None:
        """Put the manifest in order, and remove what only a restart would need."""
        self.manifest.tidy(self._temporary / "manifest")
        shutil.rmtree(self.shelf, ignore_errors=True)

    def write_grid(self, columns: int | None = None) -> None:
        """A contact sheet of the first pictures, grid.png."""
        labels, images = [], []
        for entry, _ in zip(self.manifest.entries(), range(GRID_PICTURES), strict=False):
            content = self._store.read(entry["file"])
            if content is not None:
                thumbnail = Image.open(io.BytesIO(content)).convert("RGB")
                thumbnail.thumbnail((GRID_CELL, GRID_CELL))
                images.append(thumbnail)
                labels.append(" ".join(entry["prompt"].split())[:60])
        if images:
            buffer = io.BytesIO()
            contact_sheet(images, columns or max(1, round(len(images) ** 0.5)), labels).save(buffer, format="PNG")
            self.write_file(self._named("grid", ".png"), buffer.getvalue())

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file beside the pictures."""
        try:
            FolderStore(self.folder, self._temporary).write({name: content})
        except OSError as error:
            raise self._unwritable(error) from None
        return self.folder / name

    def write_with(self, stem: str, ending: str, write: Callable[[Path], object]) -> None:
        """Have a file beside the pictures written whole."""
        temporary = self._temporary / f"{stem}{ending}"
        try:
            write(temporary)
            temporary.replace(self.path(stem, ending))
        except OSError as error:
            raise self._unwritable(error) from None

    def path(self, stem: str, ending: str) -> Path:
        """A file beside the pictures, each shard's its own."""
        return self.folder / self._named(stem, ending)

    def _named(self, stem: str, ending: str) -> str:
        return self.layout.named(stem, ending)

    def _occupied(self) -> CascadeError:
        return CascadeError(f"{self.folder}: holds the pictures of an earlier run; name another folder, or --overwrite")

    def _unwritable(self, error: OSError) -> CascadeError:
        return CascadeError(
            f"{self.folder}: cannot be written: {error.strerror or error}; name another folder with --out"
        )


def _with_seed(settings: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings as JSON would give them back, with a seed."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    if plain.get("seed") is None:
        plain["seed"] = fresh_seed() if earlier is None else earlier["seed"]
    return plain


def _told(value: Any) -> str:
    return "not given" if value is None else os.fsdecode(json.dumps(value, ensure_ascii=False))[:80]
