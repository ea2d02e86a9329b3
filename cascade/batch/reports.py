"""Reports: a run's progress on the terminal; and a table, a page and a contact sheet made from its manifest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import quote

from tqdm import tqdm

from cascade.errors import message, output_error
from cascade.files.text import json_text
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import contact_sheet
from cascade.pictures.rasters import shown_file
from cascade.prompts.records import Failure
from cascade.text.language import well_formed

# --- progress --------------------------------------------------------------------------------------------------------
# Progress of a run on the terminal: nothing, a bar, or lines of JSON.

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


# --- report ----------------------------------------------------------------------------------------------------------
# Reports made from a manifest: a table, a page of pictures and prompts, a contact sheet.

T = TypeVar("T")
GRID_CELL = 256
"""Maximum width of a picture on the contact sheet."""
GRID_PICTURES = 100
"""Maximum number of pictures on the contact sheet; it shows the first ones."""
_ROWS = 1000  # rows of a table in memory at a time
_PAGE = Path(__file__).with_name("page.html")


def write_parquet(entries: Iterable[Mapping[str, Any]], path: Path) -> None:
    """A manifest as a table; settings and stages are JSON text, because their columns differ from model to model."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        **dict.fromkeys(("index", "seed", "run_seed", "number", "num_images"), pa.int64()),
        **dict.fromkeys(("id", "prompt", "negative_prompt", "model", "license", "cascade"), pa.string()),
        **dict.fromkeys(("settings", "file", "stages", "sha256"), pa.string()),
        "seconds": pa.float64(),
    }
    schema = pa.schema(list(columns.items()))
    # An open file, because pyarrow accepts only UTF-8 paths.
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for rows in _groups(entries, _ROWS):
            plain = [{name: _cell(row.get(name)) for name in columns} for row in rows]
            writer.write_table(pa.Table.from_pylist(plain, schema))


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    return json.dumps(value) if isinstance(value, dict) else value


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def write_page(entries: Iterable[Mapping[str, Any]], path: Path, title: str) -> None:
    """One self-contained HTML file: pictures with their prompts, searchable, loaded as they are scrolled into view."""
    parts = _PAGE.read_text(encoding="utf-8").split("PICTURES")
    head, tail = (part.replace("TITLE", _escaped(well_formed(title))) for part in parts)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(head)
        for number, entry in enumerate(entries):
            size, seed = entry["settings"], str(entry["seed"])  # as text, because JavaScript would round it
            picture = [quote(entry["file"]), entry["prompt"], entry["id"], seed, size["width"], size["height"]]
            # `</script>` in a prompt must not end the script.
            file.write((",\n" if number else "") + json_text(picture).replace("<", "\\u003c"))
        file.write(tail)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


FRAME_MILLISECONDS = 80


def write_animation(
    entries: Iterable[Mapping[str, Any]],
    read: Callable[[str], bytes | None],
    path: Path,
    form: PictureFormat = RGB,
) -> None:
    """The pictures of a run as an animated WebP, lossless, in order of their prompts, there and back."""
    ordered = sorted(entries, key=lambda entry: (entry["index"], entry["number"]))
    contents = [(entry["file"], read(entry["file"])) for entry in ordered]
    frames = [shown_file(content, file, form) for file, content in contents if content is not None]
    if frames:
        first, *more = [*frames, *reversed(frames[1:-1])]
        first.save(path, "WEBP", save_all=True, append_images=more, duration=FRAME_MILLISECONDS, loop=0, lossless=True)


def write_grid(
    entries: Iterable[Mapping[str, Any]],
    read: Callable[[str], bytes | None],
    path: Path,
    columns: int | None = None,
    form: PictureFormat = RGB,
) -> None:
    """A contact sheet of the first pictures, PNG. read: returns the content of a file in the manifest, or None.

    Raises CascadeError for a picture that is damaged.
    """
    labels, images = [], []
    for entry in islice(entries, GRID_PICTURES):
        content = read(entry["file"])
        if content is not None:
            thumbnail = shown_file(content, entry["file"], form)
            thumbnail.thumbnail((GRID_CELL, GRID_CELL))
            images.append(thumbnail)
            labels.append(" ".join(entry["prompt"].split())[:60])
    if images:
        sheet = contact_sheet(images, columns or max(1, round(len(images) ** 0.5)), labels)
        sheet.save(path, format="PNG")
