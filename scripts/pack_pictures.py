"""Packs captioned pictures of one size into one file, for training on a machine without the data set.

    python scripts/pack_pictures.py pictures/emoji/train-*.parquet --out pack/emoji.npz

Larger pictures become area means; pictures of the right size keep their bytes. The file holds `blob` (all encoded
pictures, concatenated), `ends` (the end of each) and `rows`: JSON of each picture's style, captions and whether its
mirror image still agrees with them. `gpu/pictures.py` reads it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cascade.errors import CascadeError
from cascade.files.atomic import atomic_file

COLUMNS = ("image", "style", "caption_styled", "captions", "lossless")
SIDED = re.compile(
    r"\b(left|right|leftwards?|rightwards?|\w*clockwise|arrows?|flags?|letters?|numbers?|digits?|keycap|signs?|buttons?"
    r"|text|words?|abc|clock|o.clock|thirty|mark|symbol)\b",
    re.IGNORECASE,
)
"""Caption words that are wrong, or letters that are unreadable, in the mirrored picture."""

Record = dict[str, Any]
"""COLUMNS of one picture, as `prepare_art.py` writes them."""


def fitted(record: Record, size: int) -> bytes:
    """The encoded picture at size x size: on white where it is not square, lossless where its source is.

    Raises ClickException for an unreadable picture.
    """
    data: bytes = record["image"]["bytes"]
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.size == (size, size) and opened.mode == "RGB":
                return data
            image = opened.convert("RGB")
    except OSError as error:
        raise click.ClickException(f"the picture {record['caption_styled']!r} cannot be read ({error})") from None
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS)
    out = io.BytesIO()
    square.save(out, "WEBP", lossless=bool(record["lossless"]), quality=100 if record["lossless"] else 95, method=6)
    return out.getvalue()


def row(record: Record) -> dict[str, Any]:
    """The stored values of a picture apart from its pixels. Its first caption names subject and style."""
    captions = list(dict.fromkeys([record["caption_styled"], *record["captions"]]))
    return {"style": record["style"], "captions": captions, "flip": not any(map(SIDED.search, captions))}


def batches(file: Path, limit: int | None) -> Iterator[list[Record]]:
    """The records of a file, 64 at a time and `limit` in all. Raises ClickException for another kind of file."""
    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise click.ClickException(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None
    absent = [column for column in COLUMNS if column not in opened.schema_arrow.names]
    if absent:
        raise click.ClickException(f"{file}: no column {absent[0]}; name files of prepare_art.py")
    left = opened.metadata.num_rows if limit is None else limit
    for batch in opened.iter_batches(batch_size=64, columns=list(COLUMNS)):
        yield batch.to_pylist()[:left]
        left -= len(batch)
        if left <= 0:
            return


def write(out: Path, blobs: Sequence[bytes], rows: Sequence[dict[str, Any]]) -> None:
    """Write the file atomically. Raises CascadeError if it cannot be written."""
    words = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    ends = np.cumsum([len(blob) for blob in blobs])
    with atomic_file(out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, blob=np.frombuffer(b"".join(blobs), np.uint8), ends=ends, rows=words)


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", default=256, type=click.IntRange(1), help="Side in pixels; the trainer expects 256.")
@click.option("--limit", type=click.IntRange(1), help="Pictures of each file, for a trial.")
def main(files: tuple[Path, ...], out: Path, size: int, limit: int | None) -> None:
    blobs: list[bytes] = []
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor() as pool:
        for file in files:
            before = len(rows)
            for records in batches(file, limit):
                blobs += pool.map(partial(fitted, size=size), records, chunksize=8)
                rows += map(row, records)
            click.echo(f"{file.name}: {len(rows) - before}")
    if not rows:
        raise click.ClickException(f"{', '.join(map(str, files))}: no pictures; nothing was written")
    try:
        write(out, blobs, rows)
    except CascadeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {len(rows)} pictures, {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
