"""Make the small copies of the art for training.

    python scripts/prepare_data.py --data shared/data --out data

Every picture is decoded once (a 1024 px lossless WebP takes 5-60 ms, too long for each view of it), and
written as
- `<split>-64-<style>.parquet`, `<split>-256-<style>.parquet`: the whole picture, area-averaged;
- `tiles-1024-train-<style>.parquet`: 256 px tiles of the true 1024 px training pictures, for the last stage.
Photographs are cut to their central square first and get `photos-<split>-64.parquet`. Validation and test
hold all styles in one file each, as their sources do. Files that are already there are kept, so a stopped run
continues with the next source file. It takes about ten minutes on one core.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from cascade.pictures.images import downsample, from_pil, to_float, to_pil

SIZES = (64, 256)
FULL_SIZE = 1024
TILE = 256
TILES_PER_PICTURE = 4
# Tiles start at multiples of the scale 1024 / 256, so that a tile's area mean is a tile of the area mean.
GRID = FULL_SIZE // TILE
ROWS_PER_GROUP = 64

TEXT_COLUMNS = ("id", "caption", "caption_styled", "style", "name", "group", "split")
SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *[(name, pa.string()) for name in TEXT_COLUMNS],
        ("captions", pa.list_(pa.string())),
    ],
    # From this metadata `datasets` recognizes the struct as a picture.
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "image": {"_type": "Image"},
                        **{name: {"dtype": "string", "_type": "Value"} for name in TEXT_COLUMNS},
                        "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
                    }
                }
            }
        )
    },
)
Row = dict[str, Any]


class ParquetWriter:
    """Collects rows and writes them in groups; the file gets its name when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.count = 0
        self._partial = path.with_suffix(".partial")
        # Pictures are already compressed.
        self._writer = pq.ParquetWriter(self._partial, SCHEMA, compression="none")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.count += 1
        if len(self.rows) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        if self.count:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()

    def _flush(self) -> None:
        if self.rows:
            self._writer.write_table(pa.Table.from_pylist(self.rows, schema=SCHEMA))
            self.rows = []


def encode(picture: Tensor) -> bytes:
    """Float (1, 3, H, W) in [-1, 1] -> lossless WebP."""
    buffer = io.BytesIO()
    to_pil(picture)[0].save(buffer, "WEBP", lossless=True, method=1)
    return buffer.getvalue()


def central_square(picture: Tensor) -> Tensor:
    """Float (1, 3, H, W) -> (1, 3, S, S), S = min(H, W)."""
    height, width = picture.shape[-2:]
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return picture[..., top : top + size, left : left + size]


def tile_offsets(picture: Tensor, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(top, left) of tiles, drawn in proportion to the detail inside them, so that few show bare background.

    picture: float (1, 3, 1024, 1024).  Detail is the mean absolute difference of neighbouring pixels.
    """
    gray = picture.mean(dim=1, keepdim=True)
    change = torch.zeros_like(gray)
    change[..., 1:] += (gray[..., 1:] - gray[..., :-1]).abs()
    change[..., 1:, :] += (gray[..., 1:, :] - gray[..., :-1, :]).abs()
    detail = downsample(change, FULL_SIZE // GRID)[0, 0].double().numpy()
    offsets = []
    for _ in range(TILES_PER_PICTURE):
        windows = _window_sums(detail, TILE // GRID)
        # The small constant avoids a division by zero for an empty picture.
        chances = windows.ravel() + 1e-9
        top, left = divmod(int(rng.choice(chances.size, p=chances / chances.sum())), windows.shape[1])
        offsets.append((top * GRID, left * GRID))
        # Areas covered by a tile count less for the next, so that the tiles spread over the picture.
        detail[top : top + TILE // GRID, left : left + TILE // GRID] *= 0.3
    return offsets


def _window_sums(values: np.ndarray, size: int) -> np.ndarray:
    """Sum over every size x size window: (N, N) -> (N - size + 1, N - size + 1)."""
    total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    return sums.clip(min=0)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, a few in memory at a time."""
    columns = ["image", "captions", *TEXT_COLUMNS]
    for batch in pq.ParquetFile(path).iter_batches(batch_size=16, columns=columns):
        yield from batch.to_pylist()


def image_struct(encoded: bytes) -> Row:
    """The struct in which `datasets` stores a picture."""
    return {"bytes": encoded, "path": None}


def prepare_emoji(source: Path, out: Path) -> int:
    """Write the smaller copies and, for training, the tiles of one source file; returns its number of pictures."""
    split, _, style = source.stem.partition("-")
    suffix = f"-{style}" if style else ""
    paths = {size: out / f"{split}-{size}{suffix}.parquet" for size in SIZES}
    tiles_path = out / f"tiles-{FULL_SIZE}-{split}{suffix}.parquet"
    if all(path.exists() for path in paths.values()):
        return 0
    writers = {size: ParquetWriter(path) for size, path in paths.items()}
    tiles = ParquetWriter(tiles_path)
    for row in read_rows(source):
        encoded = row["image"]["bytes"]
        picture = to_float(from_pil(Image.open(io.BytesIO(encoded))))[None]
        for size, writer in writers.items():
            # Already of this size: keep the publisher's bytes.
            kept = picture.shape[-1] == size
            small = encoded if kept else encode(downsample(picture, size))
            writer.add({**row, "image": image_struct(small)})
        if split == "train" and picture.shape[-1] == FULL_SIZE:
            for tile_row in cut_tiles(row, picture):
                tiles.add(tile_row)
    # The tiles first: once the other files exist, the source file counts as done.
    tiles.close()
    for writer in writers.values():
        writer.close()
    return writers[SIZES[0]].count


def cut_tiles(row: Row, picture: Tensor) -> Iterator[Row]:
    """Rows of the tiles of one picture, the same in every run."""
    rng = np.random.default_rng(list(row["id"].encode()))
    for top, left in tile_offsets(picture, rng):
        tile = picture[..., top : top + TILE, left : left + TILE]
        yield {**row, "id": f"{row['id']}@{left},{top}", "image": image_struct(encode(tile))}


def prepare_photos(source: Path, out: Path) -> int:
    """Write the 64 px copies of one file of photographs; returns its number of pictures."""
    path = out / f"photos-{source.stem}-{SIZES[0]}.parquet"
    if path.exists():
        return 0
    writer = ParquetWriter(path)
    for row in read_rows(source):
        picture = to_float(from_pil(Image.open(io.BytesIO(row["image"]["bytes"]))))[None]
        small = downsample(central_square(picture), SIZES[0])
        writer.add({**row, "image": image_struct(encode(small))})
    writer.close()
    return writer.count


@click.command(help="Make the small copies of the art that training reads.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with emoji/ and photos/.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(path, prepare_emoji) for path in sorted((data / "emoji").glob("*.parquet"))]
    jobs += [(path, prepare_photos) for path in sorted((data / "photos").glob("*.parquet"))]
    if not jobs:
        raise click.ClickException(
            f"{data}: no emoji/*.parquet and no photos/*.parquet; name the folder that contains them"
        )
    for source, prepare in jobs:
        start = time.perf_counter()
        count = prepare(source, out)
        note = f"{count} pictures, {time.perf_counter() - start:.0f} s" if count else "already there"
        click.echo(f"{source.relative_to(data)}: {note}")


if __name__ == "__main__":
    main()
