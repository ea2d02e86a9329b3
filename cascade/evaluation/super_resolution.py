"""The sr suite: every stage of `upscale` on held-out pictures, and on pictures drawn by the previous stage.

Each figure of fidelity is also given for bicubic and Lanczos, to show the contribution of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.config.sampling import SamplingConfig
from cascade.drawing.arguments import resolve_sampling
from cascade.drawing.engine import Engine
from cascade.drawing.slots import StageSlot
from cascade.drawing.task import enlarging
from cascade.errors import CascadeError
from cascade.evaluation.distances import (
    artefacts,
    colour_shift,
    consistency,
    edge_strength,
    feature_distance,
    gradient,
    psnr,
    ssim,
)
from cascade.evaluation.report import Figure, Report, Request, judge_sha256
from cascade.evaluation.tower import Tower, load_tower
from cascade.files.containers import PICTURE, Kinds, picture_bytes, read_table, row_of
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import downsample, from_pil, to_float, to_pil
from cascade.pictures.rasters import read_given, shown
from cascade.pipeline import CascadePipeline
from cascade.seeds import generator

PICTURES = 48
"""Default number of held-out pictures for each stage."""
_SHOWN = 8
_CROP = 192
"""Side of the crops on the sheet, in pixels of the large picture: shown at 100 %, where the truth has most detail."""

_UNITS: dict[str, tuple[str, Literal["higher", "lower"]]] = {
    "PSNR": ("dB", "higher"),
    "SSIM": ("", "higher"),
    "feature distance": ("", "lower"),
    "edge strength": ("of the truth", "higher"),
    "consistency": ("dB", "higher"),
    "colour shift": ("1/255", "lower"),
    "dots": ("share", "lower"),
    "ringing": ("share", "lower"),
}
AVERAGED = tuple(_UNITS)
"""The figures of a picture that are averaged over pictures."""
_WITHOUT_TRUTH = ("consistency", "colour shift", "dots", "ringing")


@dataclass(frozen=True)
class Pair:
    """A true picture and the smaller one: (1, C, H, W) and (1, C, h, w) in [-1, 1], both rounded to stored values."""

    truth: Tensor
    low: Tensor
    caption: str
    form: PictureFormat = RGB


def run(pipeline: CascadePipeline, request: Request) -> Report:
    """Measure the stages of `upscale`. Raises CascadeError without `--data`, or when it has no large pictures."""
    if request.data is None:
        raise CascadeError("--suite sr: needs true pictures; --data: a folder with test-256.parquet, test.parquet")
    settings = resolve_sampling([slot.config for slot in pipeline.enlargers], None, request.sampling)
    form = pipeline.enlargers[-1].config.pictures
    tower, count, engine = load_tower() if form.is_rgb else None, request.limit or PICTURES, pipeline.engine()
    figures: list[Figure] = []
    sheet: list[tuple[Image.Image, str]] = []
    notes = ["Edge strength is 1 for a picture as sharp as the truth. Crops at 100 %: low, bicubic, stage, truth."]
    if tower is None:
        notes.append(f"Pictures have {form}: no feature distance, whose judge wants three channels of 8 bits.")
    lows: list[tuple[Tensor, str]] | None = None  # pictures drawn by the previous stage, with their captions
    for slot in pipeline.enlargers:
        config = slot.config
        if config.low_resolution is None:
            continue
        path = held_out_file(request.data, config.resolution)
        if path is None:
            notes.append(f"{config.name} was not measured: no pictures of {config.resolution} px in the data.")
            continue
        pairs = read_pairs(path, (config.resolution, config.low_resolution), count, request.seed, form=form)
        own = settings[config.name]
        drawn = [enlarged(engine, slot, own, pair.low, pair.caption, index) for index, pair in enumerate(pairs)]
        figures += _against_truth(config.name, pairs, drawn, tower)
        lows = lows or _base_pictures(pipeline, pairs, request)
        larger = [enlarged(engine, slot, own, *low, index) for index, low in enumerate(lows)]
        figures += _against_low(config.name, [low for low, _ in lows], larger)
        lows = [(picture, caption) for picture, (_, caption) in zip(larger, lows, strict=True)]
        sheet += crops(config.name, pairs[:_SHOWN], drawn[:_SHOWN])
    if not figures:
        raise CascadeError(f"--data {request.data}: no test-256.parquet and no test.parquet with large pictures")
    return Report(
        "sr",
        figures,
        sheet,
        columns=4,
        settings={"pictures": count, "judges_sha256": {} if tower is None else {"tower": judge_sha256(tower)}},
        notes=notes,
    )


def held_out_file(folder: Path, resolution: int) -> Path | None:
    """The file of a folder with held-out pictures of this size or larger, or None."""
    return next(
        (path for path in (folder / f"test-{resolution}.parquet", folder / "test.parquet") if path.exists()), None
    )


def read_pairs(
    path: Path,
    sizes: tuple[int, int],
    count: int,
    seed: int,
    low_column: str | None = None,
    form: PictureFormat = RGB,
) -> list[Pair]:
    """Up to `count` pictures from a Parquet file, in an order given by the seed.

    sizes: of the true and the smaller pictures; true ones that are smaller are left out. low_column: column of smaller
    pictures, in place of area means. Raises CascadeError for a file without pictures.
    """
    resolution, low_resolution = sizes
    kinds: Kinds = {"image": PICTURE, "caption_styled": str, **({low_column: PICTURE} if low_column else {})}
    table = read_table(path, kinds)
    pairs: list[Pair] = []
    for row in torch.randperm(len(table), generator=generator(seed, "sr suite", resolution)).tolist():
        record = row_of(table, row, path, kinds)
        picture = _decoded(record["image"], f"{path}: row {row}", form)
        if min(picture.shape[-2:]) < resolution:
            continue
        truth = _rounded(downsample(picture, resolution), form)
        low = (
            _decoded(record[low_column], f"{path}: row {row}", form)
            if low_column
            else _rounded(downsample(truth, low_resolution), form)
        )
        pairs.append(Pair(truth, low, record["caption_styled"], form))
        if len(pairs) == count:
            break
    if not pairs:
        raise CascadeError(f"{path}: no picture of {resolution} px or more")
    return pairs


def _decoded(stored: bytes | dict[str, Any], name: str, form: PictureFormat) -> Tensor:
    return form.to_float(read_given(picture_bytes(stored), form, name))[None]


def _rounded(picture: Tensor, form: PictureFormat) -> Tensor:
    return form.to_float(form.from_float(picture))


def resized(pair: Pair, kind: str) -> Tensor:
    """The smaller picture enlarged by PIL's `bicubic` or `lanczos`: (1, C, H, W) in [-1, 1]."""
    size, way = (pair.truth.shape[-1], pair.truth.shape[-2]), Image.Resampling[kind.upper()]
    if pair.form.is_rgb:
        return to_float(from_pil(to_pil(pair.low)[0].resize(size, way)))[None]
    bands = [Image.fromarray(band.numpy()).resize(size, way) for band in pair.low[0]]
    return _rounded(torch.from_numpy(np.stack([np.asarray(band) for band in bands]))[None], pair.form)


def enlarged(
    engine: Engine, slot: StageSlot, settings: SamplingConfig, low: Tensor, caption: str, number: int
) -> Tensor:
    """A stage's enlargement of a smaller picture (1, C, h, w) in [-1, 1]: (1, C, H, W), rounded to stored values."""
    form = slot.config.pictures
    (drawn,) = engine.draw_all([enlarging(slot, form.from_float(low)[0].cpu(), caption, settings, number=number)])
    return form.to_float(drawn.pixels[-1][None])


def _base_pictures(pipeline: CascadePipeline, pairs: Sequence[Pair], request: Request) -> list[tuple[Tensor, str]]:
    """Pictures drawn by the base stage for the captions, each with its caption."""
    base = pipeline.slots[0].config.resolution
    captions = [pair.caption for pair in pairs]
    arguments: dict[str, Any] = {**request.sampling, "progress": request.progress}
    drawn = pipeline(captions, seed=request.seed, until=base, output_type="pt", **arguments)
    return [(picture[None], caption) for picture, caption in zip(drawn.images, captions, strict=True)]


def measure(picture: Tensor, pair: Pair, tower: Tower | None) -> dict[str, float]:
    """All figures of one picture, by the names of `AVERAGED`; without a tower all but the feature distance."""
    return {
        "PSNR": psnr(picture, pair.truth),
        "SSIM": ssim(picture, pair.truth),
        **({} if tower is None else {"feature distance": feature_distance(picture, pair.truth, tower)}),
        "edge strength": edge_strength(picture, pair.truth),
        **measure_without_truth(picture, pair.low),
    }


def measure_without_truth(picture: Tensor, low: Tensor) -> dict[str, float]:
    """The figures that need only the smaller picture."""
    dots, ringing = artefacts(picture, low)
    shift = colour_shift(picture, low)
    return {"consistency": consistency(picture, low), "colour shift": shift, "dots": dots, "ringing": ringing}


def _against_truth(stage: str, pairs: Sequence[Pair], drawn: Sequence[Tensor], tower: Tower | None) -> list[Figure]:
    """The stage's figures, then those of bicubic and Lanczos, with true pictures as reference where informative."""
    true = [measure_without_truth(pair.truth, pair.low) for pair in pairs]
    figures = []
    ways: dict[str, Callable[[int], Tensor]] = {
        "": lambda index: drawn[index],
        ", bicubic": lambda index: resized(pairs[index], "bicubic"),
        ", Lanczos": lambda index: resized(pairs[index], "lanczos"),
    }
    for way, made in ways.items():
        found = [measure(made(index), pair, tower) for index, pair in enumerate(pairs)]
        for name in (name for name in AVERAGED if name in found[0]):
            reference = _mean([each[name] for each in true]) if name in ("dots", "ringing") else None
            figures.append(_figure(f"{stage}: {name}{way}", name, [each[name] for each in found], reference))
    return figures


def _against_low(stage: str, lows: Sequence[Tensor], larger: Sequence[Tensor]) -> list[Figure]:
    found = [measure_without_truth(picture, low) for picture, low in zip(larger, lows, strict=True)]
    title = f"{stage}, from drawn pictures: "
    return [_figure(title + name, name, [each[name] for each in found], None) for name in _WITHOUT_TRUTH]


def _figure(title: str, name: str, values: Sequence[float], reference: float | None) -> Figure:
    unit, better = _UNITS[name]
    return Figure(title, _mean(values), unit, better, len(values), reference)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def crops(stage: str, pairs: Sequence[Pair], drawn: Sequence[Tensor]) -> list[tuple[Image.Image, str]]:
    """The same crop of the smaller picture (pixels repeated), bicubic, the stage and the truth, for each picture."""
    shown: list[tuple[Image.Image, str]] = []
    for pair, picture in zip(pairs, drawn, strict=True):
        side, box = pair.truth.shape[-1], busiest(pair.truth, _CROP)
        low = _visible(pair.low, pair.form).resize((side, side), Image.Resampling.NEAREST)
        large = (resized(pair, "bicubic"), picture, pair.truth)
        images = (low, *(_visible(one, pair.form) for one in large))
        labels = (pair.caption, "bicubic", stage, "truth")
        shown += [(image.crop(box), label) for image, label in zip(images, labels, strict=True)]
    return shown


def _visible(picture: Tensor, form: PictureFormat) -> Image.Image:
    """(1, C, H, W) in [-1, 1] as a picture to look at."""
    return shown(form.from_float(picture[0]), form)


def busiest(picture: Tensor, side: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square with most detail in (1, 3, H, W), on a grid of a quarter of its side."""
    height, width = picture.shape[-2:]
    side = min(side, height, width)
    step = max(1, side // 4)
    sums = F.avg_pool2d(gradient(picture)[None, None], side - 1, stride=step)
    row, column = divmod(int(sums.argmax()), sums.shape[-1])
    return column * step, row * step, column * step + side, row * step + side
