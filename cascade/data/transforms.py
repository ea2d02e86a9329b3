"""Training pictures from records. Pictures are stored values (C, H, W); random generators are arguments."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.conditioning import NULL_TEXT
from cascade.conditions.settings import Measure, NumberCondition, PictureCondition, Value
from cascade.conditions.values import checked, is_missing, measured
from cascade.config.data import DataConfig, WordingConfig
from cascade.config.stage import StageConfig
from cascade.data.records import PLAIN, BadRecordError, Record, worded
from cascade.errors import CascadeError
from cascade.pictures.format import RGB, PictureFormat, mirrored
from cascade.pictures.images import downsample, upsample
from cascade.pictures.rasters import WrongFormatError, read_stored
from cascade.pictures.reading import MOST_PIXELS

_GROUND = PictureFormat.of(("condition",))
"""A format that pads with zeros, in which pictures of conditions have nothing."""
MAX_ASPECT = 20
"""Longer strips are bad records: padded to a square they are almost all white, and may not fit into memory."""


def training_pair(
    record: Record, data: DataConfig, stage: StageConfig, rng: random.Random, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The picture of one view: (C, S, S), S = data.crop or stage.resolution. Raises BadRecordError.

    For super-resolution this is the large picture; the smaller one is its area mean and needs no file. If the record
    has its own, such as one drawn by the previous stage, the same part of it is second: (C, S / scale, S / scale).
    size: height and width in place of the stage's square, of a bucket.
    """
    return prepared_pair(decode(record, stage.pictures), record, data, stage, rng, size)


@dataclass(frozen=True)
class Shown:
    """A record's pictures as a view shows them. picture, low: see `training_pair`.

    measures: what conditions may measure, by name. pictures: those of conditions, (C, S, S) uint8 like `picture`.
    mask: for the loss, (1, S, S) uint8, 255 where the picture counts.
    """

    picture: Tensor
    low: Tensor | None = None
    measures: Mapping[Measure, float] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None


def prepared_pair(
    picture: Tensor,
    record: Record,
    data: DataConfig,
    stage: StageConfig,
    rng: random.Random,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`training_pair` of a record whose picture is already decoded."""
    shown = prepared(picture, record, data, stage, rng, size)
    return shown.picture, shown.low


def prepared(
    picture: Tensor,
    record: Record,
    data: DataConfig,
    stage: StageConfig,
    rng: random.Random,
    size: tuple[int, int] | None = None,
) -> Shown:
    """A record's decoded picture, smaller picture and picture conditions for one view. Raises BadRecordError."""
    size = size or (stage.resolution, stage.resolution)
    check_strip(record, picture, data.aspect)
    original, form = (picture.shape[-2], picture.shape[-1]), stage.pictures
    moves = data.jitter > 0 and not record.drawn
    if not data.tiles:
        picture = shaped(picture, data.aspect, size, form)
        # Resized before mirroring, as in the files of `data.decoded`, so that both are equal in bits.
        picture = picture if moves else resize(picture, size, form)
    flipped = rng.random() < data.flip and not record.drawn and not names_a_side(record.captions)
    picture = mirrored(picture) if flipped else picture
    again = _copied(rng) if moves and record.mask is not None else None
    if moves:
        picture = jitter(picture, data.jitter, rng, form)
    if not data.tiles:
        picture = resize(picture, size, form)
    scale = stage.resolution // (stage.low_resolution or stage.resolution)
    low = None if record.low is None else _own_low(record, picture, scale, flipped, form)
    pictures = {
        name: _own_picture(record, name, original, data, stage, size)
        for name, config in stage.conditions.items()
        if isinstance(config, PictureCondition) and not is_missing(record.values.get(name))
    }
    pictures = {name: own.flip(-1) if flipped else own for name, own in pictures.items()}
    mask = None if record.mask is None else _mask(record, original, data, size, flipped, again)
    top, left = _cut_off(original, data, size)
    if data.crop is not None:
        if min(picture.shape[-2:]) < data.crop:
            found = f"{picture.shape[-1]}x{picture.shape[-2]}"
            raise BadRecordError(record.origin, f"the tile of {found} is smaller than data.crop {data.crop}")
        align = math.lcm(scale, *(stage.detail(name) for name in pictures))
        down, right = crop_corner(picture, data.crop, align, rng)
        picture = window(picture, down, right, data.crop)
        low = None if low is None else window(low, down // scale, right // scale, data.crop // scale)
        pictures = {name: window(own, down, right, data.crop) for name, own in pictures.items()}
        mask = None if mask is None else window(mask, down, right, data.crop)
        top, left = top + down, left + right
    height, width = original
    measures: dict[Measure, float] = {"width": width, "height": height, "aspect": width / height}
    return Shown(
        picture.contiguous(),
        None if low is None else low.contiguous(),
        {**measures, "top": top, "left": left},
        {name: own.contiguous() for name, own in pictures.items()},
        None if mask is None else mask.contiguous(),
    )


def _copied(rng: random.Random) -> random.Random:
    """A generator of the same numbers."""
    copy = random.Random()
    copy.setstate(rng.getstate())
    return copy


def _mask(
    record: Record,
    original: tuple[int, int],
    data: DataConfig,
    size: tuple[int, int],
    flipped: bool,
    moved: random.Random | None,
) -> Tensor:
    """The mask of a view before it is cropped, (1, H, W) uint8; what is padded around it does not count.

    moved: the generator of the picture's moves, if it is moved. Raises BadRecordError.
    """
    try:
        mask = decode(replace(record, image=record.mask))
    except BadRecordError as error:
        raise BadRecordError(record.origin, f"its mask: {error.reason}") from error
    if tuple(mask.shape[-2:]) != original:
        sizes = f"{mask.shape[-1]}x{mask.shape[-2]}, the picture {original[1]}x{original[0]}"
        raise BadRecordError(record.origin, f"its mask has {sizes}; they must be equal")
    mask = mask.float().mean(dim=0, keepdim=True).round().to(torch.uint8)
    if not data.tiles:
        mask = shaped(mask, data.aspect, size, _GROUND)
        mask = mask if moved else resize(mask, size, _GROUND)
    mask = mask.flip(-1) if flipped else mask
    if moved:
        mask = resize(jitter(mask, data.jitter, moved, _GROUND), size, _GROUND)
    return mask


def _cut_off(original: tuple[int, int], data: DataConfig, size: tuple[int, int]) -> tuple[float, float]:
    """(pixels above, pixels to the left) of the central part, at the view's size; 0 unless pictures are cropped."""
    if data.tiles or data.aspect == "pad":
        return 0.0, 0.0
    scale = max(wanted / side for wanted, side in zip(size, original, strict=True))
    top, left = ((side - round(wanted / scale)) // 2 * scale for wanted, side in zip(size, original, strict=True))
    return top, left


def _own_picture(
    record: Record, name: str, original: tuple[int, int], data: DataConfig, stage: StageConfig, size: tuple[int, int]
) -> Tensor:
    """A picture condition, of the view's shape and size like the picture. Raises BadRecordError."""
    config = stage.conditions[name]
    assert isinstance(config, PictureCondition)
    value = _checked(record, name, stage)
    assert isinstance(value, Tensor)
    (height, width), own = original, tuple(value.shape[-2:])
    if abs(own[0] * width - own[1] * height) > max(own) + max(original):  # beyond a pixel of rounding
        raise BadRecordError(
            record.origin, f"condition {name} has {own[1]}x{own[0]}, the picture {width}x{height}: another shape"
        )
    value = shaped(value, data.aspect, size, _GROUND)
    return config.fitted(value, size, stage.detail(name))


def _checked(record: Record, name: str, stage: StageConfig) -> Value:
    try:
        return checked(name, stage.conditions[name], record.values.get(name), record.folder)
    except CascadeError as error:
        raise BadRecordError(record.origin, str(error)) from None


def condition_values(record: Record, shown: Shown, stage: StageConfig) -> dict[str, Value]:
    """The values of the stage's conditions for a view; None where the record has none. Raises BadRecordError."""
    values: dict[str, Value] = {}
    for name, config in stage.conditions.items():
        if isinstance(config, NumberCondition) and config.measure is not None:
            values[name] = measured(config, shown.measures)
        elif isinstance(config, PictureCondition):
            values[name] = shown.pictures.get(name)
        else:
            values[name] = _checked(record, name, stage)
    return values


def dropped(
    values: Mapping[str, Value], data: DataConfig, stage: StageConfig, rng: random.Random
) -> tuple[dict[str, Value], bool]:
    """Values after dropout, and whether all conditions are dropped together, the caption included."""
    together = rng.random() < data.joint_dropout
    alone = {name: rng.random() < stage.conditions[name].dropout for name in values}
    return {name: None if together or alone[name] else value for name, value in values.items()}, together


def check_strip(record: Record, picture: Tensor, aspect: Literal["crop", "pad"]) -> None:
    """Raise BadRecordError for a picture that would be almost all white after padding."""
    height, width = picture.shape[-2:]
    if aspect == "pad" and max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRecordError(record.origin, f"a strip of {width}x{height}, beyond {MAX_ASPECT}:1, too narrow to pad")


def _own_low(record: Record, picture: Tensor, scale: int, flipped: bool, form: PictureFormat) -> Tensor:
    """The record's own smaller picture. Raises BadRecordError unless it is `scale` times smaller."""
    low = decode(replace(record, image=record.low), form)
    (height, width), (large_height, large_width) = low.shape[-2:], picture.shape[-2:]
    if (scale * height, scale * width) != (large_height, large_width):
        sizes = f"{width}x{height} and the picture {large_width}x{large_height}"
        raise BadRecordError(record.origin, f"its smaller picture has {sizes}; expected a ratio of {scale}")
    return mirrored(low) if flipped else low


_SIDES = re.compile(r"\b(left|right|clockwise|counter-?clockwise|flags?|letters?|text|word)\b", re.IGNORECASE)


def names_a_side(captions: Iterable[str]) -> bool:
    """Whether a caption speaks of left or right, or of a flag or letters, whose mirror image is another or none."""
    return any(_SIDES.search(caption) for caption in captions)


def choose_caption(record: Record, dropout: float, rng: random.Random, wording: WordingConfig = PLAIN) -> str:
    """One of the record's caption variants as `wording` changes it, or "" with probability `dropout`.

    Raises BadRecordError.
    """
    if not record.captions:
        raise BadRecordError(record.origin, "no caption")
    caption = rng.choice(record.captions)
    return NULL_TEXT if rng.random() < dropout else worded(caption, wording, rng)


def decode(record: Record, form: PictureFormat = RGB) -> Tensor:
    """The stored picture (C, H, W), upright; of 8-bit `rgb` on white. Raises BadRecordError."""
    if record.image is None:
        raise BadRecordError(record.origin, "no picture")
    if isinstance(record.image, Tensor):
        return record.image
    try:
        return read_stored(record.image, form)
    except WrongFormatError as error:
        raise BadRecordError(record.origin, str(error)) from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        hint = f"; {MOST_PIXELS} allows more" if isinstance(error, Image.DecompressionBombError) else ""
        raise BadRecordError(record.origin, f"broken picture: {error}{hint}") from error


def square(picture: Tensor, aspect: Literal["crop", "pad"], form: PictureFormat = RGB) -> Tensor:
    """The central square, or the whole picture padded to a square with the format's `fill`, white for `rgb`."""
    height, width = picture.shape[-2:]
    if height == width:
        return picture
    size = min(height, width) if aspect == "crop" else max(height, width)
    return padded(picture, (size, size), form)


def padded(picture: Tensor, size: tuple[int, int], form: PictureFormat = RGB) -> Tensor:
    """The picture with the format's `fill` around it; its centre where a side of `size` is smaller."""
    height, width = picture.shape[-2:]
    # Negative padding crops; an odd pixel goes to the right and the bottom.
    left, top = (size[1] - width) // 2, (size[0] - height) // 2
    sides = (left, size[1] - width - left, top, size[0] - height - top)
    if len(set(form.fill)) == 1:
        return F.pad(picture, sides, value=form.fill[0])
    return torch.cat([F.pad(band[None], sides, value=fill) for band, fill in zip(picture, form.fill, strict=True)])


def shaped(picture: Tensor, aspect: Literal["crop", "pad"], size: tuple[int, int], form: PictureFormat = RGB) -> Tensor:
    """The largest central part with the aspect ratio of `size`, or the whole picture padded to it."""
    if size[0] == size[1]:
        return square(picture, aspect, form)
    height, width = picture.shape[-2:]
    of_width, of_height = round(width * size[0] / size[1]), round(height * size[1] / size[0])
    if aspect == "crop":
        return padded(picture, (min(height, max(1, of_width)), min(width, max(1, of_height))), form)
    return padded(picture, (max(height, of_width), max(width, of_height)), form)


def resize(picture: Tensor, size: int | tuple[int, int], form: PictureFormat = RGB) -> Tensor:
    """A picture at `size`: exact area mean of a larger one; a smaller one is enlarged bicubically.

    size: height and width, or one number for both. Where only one side is larger, it is reduced first.
    """
    target = (size, size) if isinstance(size, int) else size
    height, width = picture.shape[-2:]
    if (height, width) == target:
        return picture
    smaller = (min(height, target[0]), min(width, target[1]))
    changed = form.to_float(picture)[None]
    if smaller != (height, width):
        changed = downsample(changed, smaller)
    if smaller != target:
        changed = upsample(changed, target)
    return form.from_float(changed)[0]


def crop_corner(picture: Tensor, size: int, align: int, rng: random.Random) -> tuple[int, int]:
    """(top, left) of a square of `size` inside (..., H, W), multiples of `align`.

    With `align` the scale of the stage, the area mean of the crop is the same crop of the area mean.
    """
    height, width = picture.shape[-2:]
    top = align * rng.randrange((height - size) // align + 1)
    left = align * rng.randrange((width - size) // align + 1)
    return top, left


def window(picture: Tensor, top: int, left: int, size: int) -> Tensor:
    """A square of `size`: (..., H, W) -> (..., size, size)."""
    return picture[..., top : top + size, left : left + size]


def jitter(picture: Tensor, amount: float, rng: random.Random, form: PictureFormat = RGB) -> Tensor:
    """Zoom by 1 +- `amount`, shift by up to `amount` of the size along each axis, with the format's `fill` around."""
    zoom, shift_x, shift_y = (rng.uniform(-amount, amount) for _ in range(3))
    scale = 1 / (1 + zoom)
    # affine_grid maps positions in the result to positions in the picture, in [-1, 1]: a shift by the size is 2.
    matrix = torch.tensor([[scale, 0, 2 * shift_x], [0, scale, 2 * shift_y]])
    # The difference from the fill, because grid_sample pads with zeros.
    fill = torch.tensor(form.fill)[:, None, None]
    negative = fill - form.linear(picture)[None]
    grid = F.affine_grid(matrix[None], list(negative.shape), align_corners=False)
    moved = F.grid_sample(negative, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    low, high = (torch.tensor(ends)[:, None, None] for ends in zip(*form.limits, strict=True))
    return form.stored((fill - moved[0]).clamp(low, high))
