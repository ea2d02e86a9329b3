"""Reports made from a manifest: a table, a page of pictures and prompts, a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from cascade.files.text import json_text
from cascade.images import contact_sheet
from cascade.pixels import RGB, PictureFormat
from cascade.rasters import shown_file
from cascade.text.captions import well_formed

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
