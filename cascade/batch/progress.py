"""Progress of a run on the terminal: nothing, a bar, or lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from cascade.errors import output_error
from cascade.prompts.record import Failure
from cascade.quoting import message

_BETWEEN_SECONDS = 0.2


class Progress:
    """Receives every picture and failure. This base class prints only the failures, one line each, on stderr."""

    def begin(self, total: int | None) -> None:
        """total: approximate number of pictures of this run, or None if unknown."""

    def step(self, stage: str, step: int, steps: int) -> None:
        """Report a finished step of a stage, for the current batch."""

    def kept(self) -> None:
        """Report a picture that an earlier run finished."""

    def picture(self, line: Mapping[str, Any]) -> None:
        """Report a picture that was written. line: its line of the manifest."""

    def failed(self, failure: Failure) -> None:
        """Report something that could not be drawn."""
        with suppress(OSError):  # failures.jsonl has it, too
            print(_shown(failure), file=sys.stderr)

    def end(self) -> None:
        """Report the end of the run."""


class Bar(Progress):
    """A bar with pictures per second, time left and failures."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._failures = 0
        self._shown = 0.0

    def begin(self, total: int | None) -> None:
        self._bar = tqdm(total=total, unit=" pictures", smoothing=0.05)

    def step(self, stage: str, step: int, steps: int) -> None:
        if self._bar is not None and time.monotonic() - self._shown > _BETWEEN_SECONDS:
            self._shown = time.monotonic()
            self._bar.set_description_str(f"{stage} {step}/{steps}")

    def kept(self) -> None:
        # Kept pictures take no time: counted as done from the start, so that they do not count as speed.
        assert self._bar is not None, "begin() comes first"
        self._bar.initial += 1
        self._bar.update()

    def picture(self, line: Mapping[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        assert self._bar is not None, "begin() comes first"
        self._bar.update()

    def failed(self, failure: Failure) -> None:
        self._failures += 1
        tqdm.write(_shown(failure), file=sys.stderr)
        if self._bar is not None:
            self._bar.set_postfix(failed=self._failures)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()


class JsonLog(Progress):
    """One line of JSON per event, on stdout, in ASCII, which every terminal and pipe accepts."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdout
        self._start = time.monotonic()
        self._counts = {"pictures": 0, "kept": 0, "failures": 0}

    def begin(self, total: int | None) -> None:
        self.write("begin", total=total)

    def kept(self) -> None:
        self._counts["kept"] += 1

    def picture(self, line: Mapping[str, Any]) -> None:
        self._counts["pictures"] += 1
        rate = self._counts["pictures"] / (time.monotonic() - self._start)
        names = ("index", "id", "number", "file", "seconds")
        self.write(
            "picture", **{name: line[name] for name in names}, **self._counts, pictures_per_second=round(rate, 3)
        )

    def failed(self, failure: Failure) -> None:
        self._counts["failures"] += 1
        self.write("failure", origin=failure.origin, reason=failure.reason, **self._counts)

    def write(self, event: str, **values: Any) -> None:
        """Print one line, and flush it."""
        try:
            print(json.dumps({"event": event, **values}), file=self._file, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise output_error(error) from None


def _shown(failure: Failure) -> str:
    """A failure in one line; a mistake in a prompt keeps the lines with the caret under its place."""
    text = str(failure)
    return message(text if text.endswith("^") else text.replace("\n", " "))
