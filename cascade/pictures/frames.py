"""The full content of a picture file: its frames, their durations, its EXIF data and its transparency."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from cascade.errors import CascadeError
from cascade.pictures.reading import MOST_PIXELS, most_pixels, open_picture, picture_errors, straight

# --- frames ----------------------------------------------------------------------------------------------------------
# The full content of a picture file: its frames, their durations, and its EXIF data.

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
"""Formats whose further pictures are frames. In a TIFF they are pages, in a phone's JPEG (MPO) other views."""
_LONGEST = 65_535  # milliseconds, the maximum of PNG's two bytes
_STRUCTURE = {
    *range(0x00FE, 0x0108),  # sizes, bits, compression
    *(0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D, 0x0140, 0x0152, 0x0153),
    *range(0x0142, 0x014B),  # tiles
    *(0x015B, 0x02BC, 0x8773),  # JPEG's tables, XMP, the colour profile
}
"""TIFF tags about how pixels were stored, orientation included, which a file of other pixels must not repeat."""
_PARTS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_BAD_EXIF = (SyntaxError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Frames:
    """A still picture, or an animation.

    images: RGB or RGBA, all of one size, sRGB, upright, without metadata. durations: milliseconds, one per frame.
    plays: number of times the animation runs, 0 for endless.
    """

    images: Sequence[Image.Image]
    durations: Sequence[float]
    plays: int
    exif: Image.Exif

    @property
    def is_animated(self) -> bool:
        """Whether there is more than one picture."""
        return len(self.images) > 1


def read_frames(path: str | Path) -> Frames:
    """All frames of a file. Raises CascadeError for other files, and for more pixels than `check_pixels` allows."""
    with picture_errors(str(path)), open_picture(path) as opened:
        plays, exif = _plays(opened), _exif(opened)
        places = _places(opened)
        check_pixels(str(path), len(places), opened.size)
        shown = list(_shown(opened, places))
    return Frames([image for image, _ in shown], [duration for _, duration in shown], plays, exif)


def check_pixels(name: str, frames: int, size: tuple[int, int]) -> None:
    """Raises CascadeError for an animation whose frames do not fit into memory together. A still always passes."""
    pixels = frames * size[0] * size[1]
    if frames > 1 and pixels > most_pixels():
        raise CascadeError(
            f"{name}: {frames} frames of {size[0]}x{size[1]} have {pixels:,} pixels, more than {most_pixels():,}; make"
            f" them smaller, or set {MOST_PIXELS} to as many"
        )


def save_png(path: Path, frames: Frames, texts: PngInfo) -> None:
    """Write a PNG, for several frames an animated one (APNG). Raises OSError."""
    first, *others = frames.images
    exif = _exif_for(frames.exif, first.size)
    if not others:
        first.save(path, format="PNG", pnginfo=texts, exif=exif)
        return
    first.save(
        path,
        format="PNG",
        pnginfo=texts,
        exif=exif,
        save_all=True,
        append_images=others,
        duration=[min(duration, _LONGEST) for duration in frames.durations],
        loop=frames.plays,
    )


def _places(image: Image.Image) -> range:
    """Positions of the frames among a file's pictures."""
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
    # A PNG may begin with a picture for programs that do not support animation.
    return range(1 if count > 1 and image.info.get("default_image") else 0, count)


def _shown(image: Image.Image, places: range) -> Iterator[tuple[Image.Image, float]]:
    """(frame, milliseconds), in order."""
    for place in places:
        image.seek(place)
        image.load()  # WebP sets a frame's duration only when it is decoded
        duration = float(image.info.get("duration", 0))
        frame = straight(image)
        frame.info.clear()  # else the profile would be applied again
        yield frame, duration


def _plays(image: Image.Image) -> int:
    """Number of plays. A GIF counts the repeats, and without a count plays once; PNG and WebP count the plays."""
    if image.format != "GIF":
        return int(image.info.get("loop", 0))
    repeats = image.info.get("loop")
    return 1 if repeats is None else repeats + 1 if repeats else 0


def _exif(image: Image.Image) -> Image.Exif:
    """The file's EXIF without tags about how pixels were stored or rotated; empty if it is damaged."""
    kept = Image.Exif()
    try:
        exif = image.getexif()
        parts = {part: dict(exif.get_ifd(part)) for part in _PARTS}
        kept.update({tag: value for tag, value in exif.items() if tag not in _STRUCTURE})
        kept.update({part: details for part, details in parts.items() if details})
        kept.tobytes()
    except _BAD_EXIF:
        return Image.Exif()
    return kept


def _exif_for(exif: Image.Exif, size: tuple[int, int]) -> bytes | None:
    """EXIF adapted to a picture of `size` in sRGB; None if there is none."""
    details = exif.get(ExifTags.IFD.Exif, {})
    width, height = size
    now = {ExifTags.Base.ColorSpace: 1, ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
    details.update({tag: value for tag, value in now.items() if tag in details})
    return exif.tobytes() if len(exif) else None


# --- alpha -----------------------------------------------------------------------------------------------------------
# Transparency of a picture to enlarge: its colours and its alpha channel are enlarged separately, then joined.

_Array: TypeAlias = np.ndarray[Any, Any]
_NEAR = 4
"""Distance in pixels over which transparent pixels take the colours of their neighbours; bicubic needs two."""


def is_opaque(image: Image.Image) -> bool:
    """Whether an RGB or RGBA picture has no transparent pixel."""
    return image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255


def bled(image: Image.Image) -> Image.Image:
    """RGB of RGBA, in which transparent pixels (alpha 0) continue the colours of those around them.

    The colour of a transparent pixel is arbitrary, often white or black, and would mix into the edges as a fringe. All
    other pixels keep their colours; a fully transparent picture becomes white.
    """
    pixels = np.asarray(image, dtype=np.float32)
    colours, weights = pixels[..., :3], pixels[..., 3:] / 255
    if not weights.any():
        return Image.new("RGB", image.size, "white")
    for _ in range(_NEAR):
        colours, weights = _grown(colours, weights)
    return Image.fromarray(_filled(colours, weights).round().astype(np.uint8))


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """RGBA from an enlarged RGB picture and the alpha channel of the smaller one, which is enlarged as a picture."""
    whole = image.copy()
    whole.putalpha(alpha.resize(image.size, Image.Resampling.BICUBIC))
    return whole


def _grown(colours: _Array, weights: _Array) -> tuple[_Array, _Array]:
    """Give each transparent pixel with visible neighbours their mean colour, weighted by alpha, and mean alpha."""
    height, width = weights.shape[:2]
    sums = np.pad(np.concatenate((colours * weights, weights, weights > 0), axis=2), ((1, 1), (1, 1), (0, 0)))
    around = reduce(add, (sums[top : top + height, left : left + width] for top, left in product(range(3), repeat=2)))
    total, count = around[..., 3:4], around[..., 4:]
    new = (weights == 0) & (total > 0)
    mean = around[..., :3] / np.where(new, total, 1)
    return np.where(new, mean, colours), np.where(new, total / np.maximum(count, 1), weights)


def _filled(colours: _Array, weights: _Array) -> _Array:
    """Give transparent pixels the mean colour of the smallest square around them that contains a visible one.

    The squares are those of a pyramid, 2, 4, 8, ... pixels wide. Source: pull-push of Gortler et al. (1996), in which
    distant pixels count only where no nearer ones are known.
    """
    if (weights > 0).all():
        return colours
    total = _halved(weights)
    mean = _halved(colours * weights) / np.where(total > 0, total, 1)
    behind = _filled(mean, total).repeat(2, axis=0).repeat(2, axis=1)
    height, width = weights.shape[:2]
    return np.where(weights > 0, colours, behind[:height, :width])


def _halved(values: _Array) -> _Array:
    """(H, W, C) -> sums over squares of two by two."""
    height, width = values.shape[:2]
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, -1).sum(axis=(1, 3))
