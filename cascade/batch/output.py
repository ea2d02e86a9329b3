"""An output folder: pictures, the manifest of all finished ones, and the state from which a later run continues."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cascade import system
from cascade.batch.folder import MADE_BY, PROGRAM, RUN, STATE, EarlierRun, Layout, with_seed
from cascade.batch.manifest import Manifest
from cascade.batch.plan import Target
from cascade.batch.stores import Finished, FolderStore, Pictures, Store, TarStore
from cascade.batch.team import Team
from cascade.errors import StorageError
from cascade.files.locks import held
from cascade.files.paths import path_of
from cascade.files.text import check_regular, json_text
from cascade.prompts.records import Failure


class Output:
    """The folder of a run. `begin` takes the lock; it ends with the process."""

    def __init__(
        self,
        folder: str | Path,
        layout: Layout | None = None,
        *,
        overwrite: bool = False,
        extras: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Raises CascadeError when the folder cannot be written, or holds other files that the run would touch.

        overwrite: start again; the pictures of the earlier run are removed. extras: files that `write_with` will write.
        """
        self.folder, self.layout, self._overwrite = path_of(folder), layout or Layout(), overwrite
        self._state = self.folder / STATE
        self._spool, self._temporary = self._own_state("spool"), self._own_state("temporary")
        self.team = Team(self._state, self.layout)
        self._earlier = EarlierRun(self.folder, self.layout)
        with self._writing():
            self._earlier.check_foreign_files(extras, overwrite)
            # With an earlier run here, a file with a picture's name is that run's, which may have died before its line.
            may_replace = self._earlier.settings() is not None
        self._store: Store = FolderStore(self.folder, self._temporary, may_replace)
        if self.layout.in_tars:
            self._store = TarStore(self.folder, self._spool, self._temporary, self.layout.tar_size, may_replace)
        self._manifest: Manifest | None = None
        self._made = not self.folder.exists()
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass  # fail now rather than after the first picture

    # --- beginning and end

    def begin(
        self, settings: Mapping[str, Any], check: Callable[[dict[str, Any]], object] = lambda _: None
    ) -> dict[str, Any]:
        """Take the folder, or continue in it. settings: those that must stay the same when a run is continued.

        Returns them with a seed: where it is None, the seed of the earlier run, or a new one. check: called with them
        before an earlier run's pictures are removed; it raises what would end the new run before its first picture.

        Raises CascadeError when another run writes here, or the earlier run had other settings.
        """
        with self._writing():
            self._state.mkdir(exist_ok=True)
            first = self.team.enter()
            settled = self._prepared(settings, check) if first else self._earlier.continued(settings)
            self._manifest = Manifest(self.path("manifest", ".jsonl"))
            self._manifest.refresh()
            if first:
                self._manifest.warn_of_spoilt()
                self.team.let_in(before=self._manifest.size)
            self.team.start()
        self._pictures = Pictures(self.folder, self.layout, self._store, self._manifest)
        return settled

    def _prepared(self, settings: Mapping[str, Any], check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        if self._overwrite:
            settled = with_seed(settings)
            if self._earlier.has_pictures():
                check(settled)
            self._earlier.remove()
            shutil.rmtree(self._spool, ignore_errors=True)
        else:
            self._earlier.finish_removal()
            settled = self._earlier.continued(settings) if self._earlier.has_pictures() else with_seed(settings)
        if self._earlier.settings() != settled:
            shutil.rmtree(self.shelf, ignore_errors=True)  # smaller pictures of other settings or another model
        shutil.rmtree(self._temporary, ignore_errors=True)  # incomplete files of a killed run
        self._temporary.mkdir(exist_ok=True)
        self.path("failures", ".jsonl").unlink(missing_ok=True)
        text = json_text({MADE_BY: PROGRAM, **settled}, indent=2) + "\n"
        FolderStore(self.folder, self._temporary).write({RUN: text.encode()})
        return settled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything; remove a folder that was created but not used."""
        nothing = self._manifest is None or (self._manifest.is_empty() and self._holds_nothing_else())
        if self._manifest is not None:
            self._manifest.close()
        self.team.leave()
        if nothing and self._made and self.team.rank == 0:
            if system.OPEN_FILES_STAY:
                self.team.unlock()
            with suppress(OSError):  # not empty, or a disk that fails
                for path in (self.folder / RUN, self.path("manifest", ".jsonl"), self.path("failures", ".jsonl")):
                    path.unlink(missing_ok=True)
                shutil.rmtree(self._state, ignore_errors=True)
                self.folder.rmdir()
        self.team.unlock()

    def _holds_nothing_else(self) -> bool:
        """Whether there is no picture; one whose line could not be written is the run's only by its run.json."""
        own = {RUN, STATE, self.path("manifest", ".jsonl").name, self.path("failures", ".jsonl").name}
        try:
            return {path.name for path in self.folder.iterdir()} <= own
        except OSError:
            return False

    # --- during the run

    @property
    def manifest(self) -> Manifest:
        """The open manifest, after `begin`."""
        assert self._manifest is not None, "begin() comes first"
        return self._manifest

    @property
    def shelf(self) -> Path:
        """The folder that holds smaller pictures between stages when memory is short."""
        return self._own_state("shelf")

    def owns(self, index: int) -> bool:
        """Whether a line belongs to this shard."""
        which, count = self.layout.shard
        unit = self._store.unit(index)
        return (index if unit is None else unit) % count == which

    def unit(self, index: int) -> int | None:
        """The number of the tar that a prompt belongs to; None: no tars."""
        return self._store.unit(index)

    def claim(self, unit: int) -> bool:
        """Whether this process may draw a unit."""
        claimed = self.team.claim(unit)
        if claimed and self.team.count > 1:
            self.manifest.refresh()  # another process may have died in the middle of this unit
        return claimed

    def has(self, target: Target) -> bool:
        """Whether a picture is finished and whole: `Pictures.has`."""
        return self._pictures.has(target)

    def write(self, finished: Finished) -> dict[str, Any]:
        """Write a picture in full, then its line of the manifest, which is returned."""
        with self._writing():
            return self._pictures.write(finished)

    def read(self, name: str) -> bytes | None:
        """The content of a picture's file, or None when it is missing. name: as in the manifest."""
        return self._store.read(name)

    def fail(self, failure: Failure, **more: Any) -> None:
        """Record something that could not be drawn."""
        line = {"origin": failure.origin, "index": failure.index, "reason": failure.reason, **more}
        path = self.path("failures", ".jsonl")
        with (
            self._writing(),
            check_regular(path).open("a", encoding="utf-8", newline="\n") as file,
            held(file.fileno(), path),
        ):
            file.write(json_text(line) + "\n")
            file.flush()

    def finish(self, unit: int) -> None:
        """Pack a unit whose pictures are all written, and mark it as finished for other processes."""
        with self._writing():
            self._store.finish(unit)
        self.team.finish(unit)

    # --- after the run

    def is_everything_done(self, last: int) -> bool:
        """Whether the processes of this launch finished all units to `last`."""
        which, count = self.layout.shard if self.layout.in_tars else (0, 1)
        return self.team.are_done(range(which, last + 1, count))

    def kept(self) -> int:
        """Number of pictures of earlier runs, found by any process; call before `complete`."""
        with self._writing():  # the folder may have been removed
            return self.manifest.count(before=self.team.before)

    def failures(self) -> int:
        """Number of failures that all processes recorded."""
        path = self.path("failures", ".jsonl")
        if not path.exists():
            return 0
        with self._writing(), path.open("rb") as file:
            return sum(1 for _ in file)

    def complete(self) -> None:
        """Sort the manifest, and remove the state that only a restart needs."""
        self.manifest.tidy(self._temporary / "manifest")
        shutil.rmtree(self.shelf, ignore_errors=True)

    def write_with(self, stem: str, ending: str, write: Callable[[Path], object]) -> None:
        """Write an additional file atomically, by the function `write`."""
        temporary = self._temporary / f"{stem}{ending}"
        with self._writing():
            self._earlier.note_made(stem, ending)
            write(temporary)
            system.replace(temporary, self.path(stem, ending))

    def path(self, stem: str, ending: str) -> Path:
        """The path of an additional file; each shard has its own."""
        return self.folder / self.layout.named(stem, ending)

    def _own_state(self, name: str) -> Path:
        return self._state / self.layout.named(name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot be written: {error.strerror or error}; name another folder with --out"
            ) from None
