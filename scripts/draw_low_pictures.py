"""Smaller pictures drawn by the previous stage, paired with true large ones, for training or evaluating a stage.

    python scripts/draw_low_pictures.py "prepared/train-256-*.parquet" --stage runs/bundled/base/stage \\
        --text-encoder prepared/text_encoder --out prepared/drawn-256.parquet

A picture drawn from text alone has no true large version. Therefore the base stage redraws true pictures: the area mean
is noised to a log SNR in --levels, and the stage continues from there with the picture's caption, as in the middle of a
drawing. The composition is that of the true picture, edges and small shapes are the stage's own. A super-resolution
stage enlarges the area mean of its input size instead; with --strength below 1 it starts from the true picture with the
noise of that time, so that edges are in the true places.

Each row keeps its columns and gets `low` (`data.sources.low_column`). Rows of tiles, whose id ends in `@left,top`, get
the same part of the smaller picture; --whole names the files with their whole pictures.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from prepare_data import FULL_SIZE, encode, image_struct
from torch import Tensor

from cascade import Stage
from cascade.conditioning import Conditioning
from cascade.data.sources import matching_files
from cascade.diffusion import denoisers
from cascade.diffusion.editing import Known
from cascade.diffusion.noise import CLEAN, diffuse, noise_like
from cascade.drawing.batches import Inputs, Picture, Texts, draw_batch
from cascade.files.atomic import atomic_file
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8
from cascade.seeds import generator
from cascade.stage import limit, run_sampler
from cascade.storage.pipeline import load_encoder
from cascade.storage.stage import load_stage

BATCH = 8
Row = dict[str, Any]


def redrawn(stage: Stage, low: Tensor, texts: Texts, log_snr: float, steps: int, rng: list[torch.Generator]) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] noised to `log_snr`, and drawn from there by a base stage in `steps`."""
    settings, own, null = stage.config.sampling, texts.own, texts.null
    cond = Conditioning(own.tokens, own.mask)
    unprompted = cond.with_text(null.tokens, null.mask)
    guided = denoisers.guide(stage, cond, unprompted, settings.guidance, settings.guidance_interval)
    z = diffuse(low, noise_like(low, rng), torch.full((len(low), 1, 1, 1), log_snr))
    levels = torch.linspace(log_snr, float(stage.schedule.log_snr(torch.zeros(()))), steps + 1)
    levels[-1] = CLEAN
    return run_sampler(settings, limit(guided, settings), z, levels, rng, lambda _step, _x: None)


@torch.inference_mode()
def redrawn_by_base(stage: Stage, truth: Tensor, texts: Texts, log_snr: float, steps: int, first: int) -> Tensor:
    """True pictures (B, 3, H, W) redrawn by a base stage: uint8 (B, 3, h, w) of the stage's size."""
    rng = [generator(0, number, "redraw") for number in range(first, first + len(truth))]
    return to_uint8(redrawn(stage, downsample(truth, stage.config.resolution), texts, log_snr, steps, rng))


@torch.inference_mode()
def redrawn_by_enlarging(stage: Stage, truth: Tensor, texts: Texts, strength: float, first: int) -> Tensor:
    """True pictures (B, 3, H, W) redrawn by a super-resolution stage: uint8 (B, 3, h, w) of the stage's size."""
    config, size = stage.config, stage.config.resolution
    assert config.low_resolution is not None, "a base stage sees no smaller picture"
    low = to_uint8(downsample(truth, config.low_resolution))
    batch = [Picture(place, 0, first + place) for place in range(len(truth))]
    known = Known(downsample(truth, size), strength=strength) if strength < 1 else None
    return to_uint8(draw_batch(stage, Inputs(config.sampling, (size, size), batch, texts, low, known)))


def picture_of(row: Row) -> Tensor:
    """Float (1, 3, H, W) in [-1, 1]."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        return to_float(from_pil(image))[None]


def whole_of(row: Row, sources: dict[str, Row]) -> Row:
    """The row of the whole picture that a tile was cut from; for a whole picture the row itself."""
    name, _, tile = row["id"].partition("@")
    if tile and name not in sources:
        raise click.ClickException(f"{row['id']}: a tile; name the files with the whole pictures by --whole")
    return sources[name] if tile else row


def part_of(low: Tensor, row: Row) -> Tensor:
    """The part of a smaller picture (1, 3, s, s) that the row shows; for whole pictures all of it."""
    tile = row["id"].partition("@")[2]
    if not tile:
        return low
    scale, side = FULL_SIZE // low.shape[-1], picture_of(row).shape[-1]
    left, top = (int(number) // scale for number in tile.split(","))
    return low[..., top : top + side // scale, left : left + side // scale]


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--stage", "path", required=True, help="Folder of the stage that draws the smaller pictures.")
@click.option("--text-encoder", required=True, help="Folder of the encoder that it was trained with.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Parquet file to write.")
@click.option("--whole", default=(), multiple=True, help="For tiles: files (or a pattern) with the whole pictures.")
@click.option("--count", default=600, show_default=True, help="Number of pictures, chosen at random from all files.")
@click.option("--levels", nargs=2, default=(1.0, 3.0), show_default=True, help="Base stages: log SNR of the noise.")
@click.option("--steps", default=4, show_default=True, help="Base stages: steps from there.")
@click.option(
    "--strength",
    nargs=2,
    type=click.FloatRange(0, 1),
    default=(1.0, 1.0),
    show_default=True,
    help="Super-resolution stages: noise on the true picture to start from, as `generate --strength`.",
)
def main(
    files: tuple[str, ...],
    path: str,
    text_encoder: str,
    out: Path,
    whole: tuple[str, ...],
    count: int,
    levels: tuple[float, float],
    steps: int,
    strength: tuple[float, float],
) -> None:
    """Write the rows."""
    stage, encoder = load_stage(path), load_encoder(text_encoder, [Path(path)])
    # Without the metadata of `datasets`, which would lack the new column.
    table = pa.concat_tables([pq.read_table(file).replace_schema_metadata(None) for file in matching_files(files)])
    rng = np.random.default_rng(0)
    chosen = table.take(rng.permutation(len(table))[:count])
    sources = {row["id"]: row for file in matching_files(whole) for row in pq.read_table(file).to_pylist()}
    rows, lows = chosen.to_pylist(), []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        truth = torch.cat([picture_of(whole_of(row, sources)) for row in batch])
        captions = [row["caption_styled"] for row in batch]
        texts = Texts(encoder.encode(captions), encoder.encode([""] * len(batch)))
        if stage.config.low_resolution is None:
            pictures = redrawn_by_base(stage, truth, texts, float(rng.uniform(*levels)), steps, start)
        else:
            pictures = redrawn_by_enlarging(stage, truth, texts, float(rng.uniform(*strength)), start)
        parts = [part_of(picture, row) for row, picture in zip(batch, pictures.split(1), strict=True)]
        lows += [image_struct(encode(to_float(part))) for part in parts]
    column = pa.array(lows, type=table.schema.field("image").type)
    with atomic_file(out) as temporary:
        pq.write_table(chosen.append_column("low", column), temporary, compression="none")
    click.echo(f"{len(rows)} pictures: {out}")


if __name__ == "__main__":
    main()
