"""Reads files that nobody would write, thousands for each reader, and sums up by place what was not told in one line.

    python scripts/fuzz.py                        # 10,000 cases of each target, some hours: for the night
    python scripts/fuzz.py tar prompts --cases 200 --seed 3

Each case must be read, or refused with an error that names the file; in at most 60 seconds and 4 GB; nothing may be
written outside of its folder, and nothing half-written in it. A finding becomes a test among the reader's tests, and
its cause a value in scripts/fuzzing/mutations.py. Exit status: 0 nothing found, 1 findings.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import hypothesis
from fuzzing.targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, strategies

from cascade.errors import CascadeError, message

SECONDS, BYTES = 60, 4 << 30
_HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{8}$")
_ROOT = str(Path(__file__).parents[1])


class SlowError(BaseException):
    """A case took too long; no `except Exception` of a library stops it."""


class FoundError(AssertionError):
    """A case that was neither read nor refused as it should be."""

    def __init__(self, place: str, what: str) -> None:
        super().__init__(f"{place}: {what}")
        self.place, self.what = place, what


@dataclass
class Ground:
    """Where cases are read: valid files, a copy that is made wrong, and a file outside that nobody may touch."""

    folder: Path
    target: Target
    known: dict[str, str] = field(default_factory=dict)
    """By place, what was found there."""
    cases: int = 0

    def __post_init__(self) -> None:
        for name in ("valid", "outside"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "outside" / "canary").write_text("alive")
        self.target.make(self.folder / "valid")

    def try_case(self, rng: Random) -> None:
        """Raises FoundError for what was not found before."""
        case = self.folder / "case"
        _remove(case)
        shutil.copytree(self.folder / "valid", case, symlinks=True)
        self.target.spoil(rng, case)
        self.cases += 1
        try:
            with time_limit():
                self.target.read(case)
        except CascadeError as error:
            found = _of_message(error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except SlowError as error:  # not raised: to make it small would take the time many times over
            self.known.setdefault(_place(error), str(error))
            return
        except BaseException as error:
            found = None if isinstance(error, OSError) and error.filename is not None else _of_error(error)
        else:
            found = None
        found = found or self._of_disk(case)
        if found is not None and found.place not in self.known:
            raise found

    def _of_disk(self, case: Path) -> FoundError | None:
        outside = [path.name for path in (self.folder / "outside").iterdir()]
        if outside != ["canary"] or (self.folder / "outside" / "canary").read_text() != "alive":
            return FoundError("disk", f"something was written or removed outside: {outside}")
        left = [path for path in case.rglob(".*") if _HALF_WRITTEN.match(path.name)]
        return FoundError("disk", f"half-written: {left[0].name}") if left else None


def _of_message(error: CascadeError) -> FoundError | None:
    """A refusal that is empty, or that somebody else's text makes long or steers a terminal with."""
    text = message(str(error))
    if not text.strip() or len(text) > 20_000 or "Traceback" in text:
        return FoundError(_place(error), f"a message of {len(text)} letters: {text[:200]!r}")
    return None


def _of_error(error: BaseException) -> FoundError:
    return FoundError(_place(error), f"{type(error).__name__}: {str(error)[:200]}")


def _place(error: BaseException) -> str:
    """The innermost line of the package that an error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{_ROOT}/cascade/" in frame.filename]
    frames = frames or traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename.removeprefix(f'{_ROOT}/')}:{frames[-1].lineno}"


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises SlowError in the main thread after `SECONDS`."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SlowError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(target: Target, cases: int, seed: int, folder: Path) -> Ground:
    """Try cases of a target; each finding is made small, noted, and looked for no more."""
    ground = Ground(folder, target)
    level = logging.getLogger("cascade").level
    logging.getLogger("cascade").setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while ground.cases < cases and len(ground.known) < 50:
                _some(ground, cases - ground.cases, seed + len(ground.known))
    finally:
        logging.getLogger("cascade").setLevel(level)
        _remove(folder)
    return ground


def _some(ground: Ground, cases: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def test(rng: Random) -> None:
        ground.try_case(rng)

    before = ground.cases
    try:
        test()
    except* FoundError as found:
        for error in _leaves(found):
            ground.known[error.place] = error.what
    except* hypothesis.errors.Flaky as flaky:
        ground.known[f"flaky {len(ground.known)}"] = str(flaky)[:300]
    if ground.cases == before:
        ground.cases += 1


def _leaves(group: BaseExceptionGroup[FoundError]) -> Iterator[FoundError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    """The command; its exit status."""
    names = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(description="Read files that nobody would write.")
    parser.add_argument("targets", nargs="*", choices=[[], *names], metavar="TARGET", help=", ".join(names))
    parser.add_argument("--cases", type=int, default=10_000, help="of each target; of a slow one fewer")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fuzz-datasets-")
    found = 0
    for name in arguments.targets or names:
        target, start = names[name], time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")) / "ground"
        _limit_memory()
        ground = fuzz(target, max(1, arguments.cases // target.cost), arguments.seed, folder)
        print(f"{name}: {ground.cases} cases, {time.monotonic() - start:.0f} s, {len(ground.known)} places", flush=True)
        for place, what in sorted(ground.known.items()):
            print(f"    {place}: {message(what)}", flush=True)
        found += len(ground.known)
    _remove(Path(os.environ["HF_DATASETS_CACHE"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
