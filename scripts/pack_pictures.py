"""Packs captioned pictures of one size into one file that travels to a machine where nothing else of the data lies.

    python scripts/pack_pictures.py pictures/emoji/train-*.parquet --out pack/emoji.npz --size 256

Larger pictures become area means; what has the size already keeps its bytes. The file holds `blob` (all encoded
pictures, one after the other), `ends` (where each ends) and `rows`: JSON of each picture's style, captions and whether
its mirror image still agrees with them. `gpu/pictures.py` reads it.
"""

from __future__ import annotations

import io
import json
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

COLUMNS = ("image", "style", "caption_styled", "captions", "lossless")
SIDED = re.compile(
    r"\b(left|right|leftwards?|rightwards?|\w*clockwise|arrows?|flags?|letters?|numbers?|digits?|keycap|signs?|buttons?"
    r"|text|words?|abc|clock|o.clock|thirty|mark|symbol)\b",
    re.IGNORECASE,
)
"""Words of captions whose pictures say something else, or nothing, in a mirror."""


def fitted(record: dict[str, Any], size: int) -> bytes:
    """The encoded picture at size x size: on white where it is not square, lossless where its source is."""
    data: bytes = record["image"]["bytes"]
    with Image.open(io.BytesIO(data)) as opened:
        if opened.size == (size, size) and opened.mode == "RGB":
            return data
        image = opened.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BOX if side % size == 0 else Image.Resampling.LANCZOS)
    out = io.BytesIO()
    square.save(out, "WEBP", lossless=bool(record["lossless"]), quality=100 if record["lossless"] else 95, method=6)
    return out.getvalue()


def row(record: dict[str, Any]) -> dict[str, Any]:
    captions = list(dict.fromkeys([record["caption_styled"], *record["captions"]]))
    return {"style": record["style"], "captions": captions, "flip": not any(map(SIDED.search, captions))}


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", default=256, show_default=True)
@click.option("--limit", type=int, help="Pictures of each file, for a trial.")
def main(files: tuple[Path, ...], out: Path, size: int, limit: int | None) -> None:
    blobs: list[bytes] = []
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor() as pool:
        for file in files:
            before = len(rows)
            for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=list(COLUMNS)):
                records = batch.to_pylist()
                if limit is not None:
                    records = records[: max(limit - (len(rows) - before), 0)]
                blobs += pool.map(partial(fitted, size=size), records, chunksize=8)
                rows += map(row, records)
            click.echo(f"{file.name}: {len(rows) - before}")
    out.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(blob) for blob in blobs])
    words = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    np.savez_compressed(out, blob=np.frombuffer(b"".join(blobs), np.uint8), ends=ends, rows=words)
    click.echo(f"{out}: {len(rows)} pictures, {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
