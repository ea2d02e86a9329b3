"""Smaller pictures as the stage before draws them, beside the true large ones: to train a stage on, or to judge it by.

    python scripts/draw_low_pictures.py prepared/train-256-noto.parquet --stage sr256 --out prepared/drawn-256.parquet

A picture that a base stage draws from words alone has no true large one. So the base stage redraws true pictures: the
area mean is noised to a log SNR of --levels, and the stage goes on from there under the picture's caption, as it would
in the middle of a drawing. What the noise left standing is the truth's, edges and small shapes are the stage's own.
A super-resolution stage in that place enlarges the area mean of the size that it starts from.

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
from prepare_data import encode, image_struct
from torch import Tensor

from cascade import CascadePipeline, Stage
from cascade.conditioning import Conditioning
from cascade.diffusion import denoisers
from cascade.diffusion.noise import diffuse, noise_like
from cascade.drawing import Picture, Texts, draw_batch
from cascade.images import downsample, from_pil, to_float, to_uint8
from cascade.seeds import generator
from cascade.stage import limit, run_sampler

BATCH = 8


def redrawn(stage: Stage, low: Tensor, texts: Texts, log_snr: float, steps: int, rng: list[torch.Generator]) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] noised to `log_snr`, and drawn from there by a base stage in `steps`."""
    settings, own, null = stage.config.sampling, texts.own, texts.null
    cond = Conditioning(own.tokens, own.mask)
    guided = denoisers.guide(stage, cond, cond.with_text(null.tokens, null.mask), settings.guidance)
    z = diffuse(low, noise_like(low, rng), torch.full((len(low), 1, 1, 1), log_snr))
    levels = torch.linspace(log_snr, float(stage.noise_levels()[-1]), steps + 1)
    return run_sampler(settings, limit(guided, settings), z, levels, rng, lambda _step, _x: None)


@torch.inference_mode()
def smaller(
    pipeline: CascadePipeline, before: Stage, truth: Tensor, captions: list[str], level: float, steps: int, first: int
) -> Tensor:
    """What the stage before has for these true pictures (B, 3, H, W): uint8 (B, 3, h, w) of its own size."""
    texts, config = pipeline.texts(captions), before.config
    if config.low_resolution is None:
        rng = [generator(0, first + place, "redraw") for place in range(len(truth))]
        return to_uint8(redrawn(before, downsample(truth, config.resolution), texts, level, steps, rng))
    low = to_uint8(downsample(truth, config.low_resolution))
    batch = [Picture(place, 0, first + place) for place in range(len(truth))]
    return to_uint8(draw_batch(before, config.sampling, (config.resolution,) * 2, batch, texts, low))


def picture_of(row: dict[str, Any]) -> Tensor:
    """Float (1, 3, H, W) in [-1, 1]."""
    return to_float(from_pil(Image.open(io.BytesIO(row["image"]["bytes"]))))[None]


def whole_of(row: dict[str, Any], sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of the whole picture that a tile was cut from; a row that is no tile itself."""
    name, _, tile = row["id"].partition("@")
    if tile and name not in sources:
        raise click.ClickException(f"{row['id']}: a tile; name the files with the whole pictures by --whole")
    return sources[name] if tile else row


def part_of(low: Tensor, tile: str, large: int, resolution: int) -> Tensor:
    """The part of a smaller picture (1, 3, s, s) that shows a tile of `large` px, cut at `left,top` of `resolution`."""
    scale = resolution // low.shape[-1]
    left, top = (int(number) // scale for number in tile.split(","))
    return low[..., top : top + large // scale, left : left + large // scale]


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--model", default=None, help="Folder or hub id; default the bundled cascade.")
@click.option("--stage", "name", required=True, help="The stage that the pictures are for; the one before it draws.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Parquet file to write.")
@click.option("--whole", default=(), multiple=True, help="For tiles: files with the whole pictures, of any size.")
@click.option("--count", default=400, show_default=True, help="Pictures, drawn by lot from all files.")
@click.option("--levels", nargs=2, default=(1.0, 3.0), show_default=True, help="Range of log SNR of the noise.")
@click.option("--steps", default=4, show_default=True, help="Steps from there.")
def main(
    files: tuple[str, ...],
    model: str | None,
    name: str,
    out: Path,
    whole: tuple[str, ...],
    count: int,
    levels: tuple[float, float],
    steps: int,
) -> None:
    """Write the rows."""
    pipeline = CascadePipeline.from_pretrained(model)
    place = pipeline.stage_names.index(name)
    before, resolution = pipeline.slots[place - 1].load(), pipeline.slots[place].config.resolution
    tables = [pq.read_table(path) for path in files]
    table = pa.concat_tables([each.replace_schema_metadata(None) for each in tables])
    rng = np.random.default_rng(0)
    chosen = table.take(rng.permutation(len(table))[:count])
    sources = {row["id"]: row for path in whole for row in pq.read_table(path).to_pylist()}
    rows, lows = chosen.to_pylist(), []
    with click.progressbar(range(0, len(rows), BATCH)) as starts:
        for start in starts:
            batch = rows[start : start + BATCH]
            truth = torch.cat([picture_of(whole_of(row, sources)) for row in batch])
            captions = [row["caption_styled"] for row in batch]
            pictures = smaller(pipeline, before, truth, captions, float(rng.uniform(*levels)), steps, start)
            for row, picture in zip(batch, pictures.split(1), strict=True):
                tile = row["id"].partition("@")[2]
                low = part_of(picture, tile, picture_of(row).shape[-1], resolution) if tile else picture
                lows.append(image_struct(encode(to_float(low))))
    kind = table.schema.field("image").type
    pq.write_table(chosen.append_column("low", pa.array(lows, type=kind)), out, compression="none")
    click.echo(f"{len(rows)} pictures: {out}")


if __name__ == "__main__":
    main()
