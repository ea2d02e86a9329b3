"""All that a picture file holds: its frames, how long each is shown, and what its camera noted."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from cascade.errors import CascadeError
from cascade.files.picture import MOST_PIXELS, most_pixels, open_picture, picture_errors, straight

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
"""Formats whose further pictures are frames. Those of a TIFF are pages, of a phone's JPEG (MPO) other views."""
_LONGEST = 65_535  # milliseconds: what PNG's two bytes hold
_STRUCTURE = {
    *range(0x00FE, 0x0108),  # sizes, bits, compression
    *(0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D, 0x0140, 0x0152, 0x0153),
    *range(0x0142, 0x014B),  # tiles
    *(0x015B, 0x02BC, 0x8773),  # JPEG's tables, XMP, the colour profile
}
"""TIFF tags of how the pixels were stored, which a file of other pixels must not repeat; the orientation is one."""
_PARTS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
_BAD_EXIF = (SyntaxError, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Frames:
    """A still picture, or an animation.

    images: RGB or RGBA, all of one size, sRGB, upright, without metadata. durations: milliseconds, one a frame.
    plays: how often the animation runs, 0 without end.
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
    """Raises CascadeError for what is no picture, and for more pixels in all frames than `check_pixels` allows."""
    with picture_errors(str(path)), open_picture(path) as opened:
        plays, exif = _plays(opened), _exif(opened)
        places = _places(opened)
        check_pixels(str(path), len(places), opened.size)
        shown = list(_shown(opened, places))
    return Frames([image for image, _ in shown], [duration for _, duration in shown], plays, exif)


def check_pixels(name: str, frames: int, size: tuple[int, int]) -> None:
    """Raises CascadeError for an animation whose frames do not fit into memory together. A still is never refused."""
    pixels = frames * size[0] * size[1]
    if frames > 1 and pixels > most_pixels():
        raise CascadeError(
            f"{name}: {frames} frames of {size[0]}x{size[1]} have {pixels:,} pixels, more than {most_pixels():,}; make"
            f" them smaller, or set {MOST_PIXELS} to as many"
        )


def save_png(path: Path, frames: Frames, texts: PngInfo) -> None:
    """A PNG, of several frames an animated one (APNG). Raises OSError."""
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
    """Which of a file's pictures are frames."""
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
    # A PNG may begin with a picture for programs that know no animation.
    return range(1 if count > 1 and image.info.get("default_image") else 0, count)


def _shown(image: Image.Image, places: range) -> Iterator[tuple[Image.Image, float]]:
    """(frame, milliseconds), one after another."""
    for place in places:
        image.seek(place)
        image.load()  # WebP says how long a frame stays when it is decoded
        duration = float(image.info.get("duration", 0))
        frame = straight(image)
        frame.info.clear()  # a profile would be applied again
        yield frame, duration


def _plays(image: Image.Image) -> int:
    """A GIF counts the repeats, and without a count is shown once; PNG and WebP count the times it is shown."""
    if image.format != "GIF":
        return int(image.info.get("loop", 0))
    repeats = image.info.get("loop")
    return 1 if repeats is None else repeats + 1 if repeats else 0


def _exif(image: Image.Image) -> Image.Exif:
    """What the camera noted, but nothing of how pixels were stored or turned; empty where it is damaged."""
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
    """As it holds for a picture of `size` in sRGB. None where nothing is noted."""
    details = exif.get(ExifTags.IFD.Exif, {})
    width, height = size
    now = {ExifTags.Base.ColorSpace: 1, ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
    details.update({tag: value for tag, value in now.items() if tag in details})
    return exif.tobytes() if len(exif) else None
