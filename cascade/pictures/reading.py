"""Pictures of any mode, depth and colour space -> 8 bits, sRGB, upright, the form that most other modules expect."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from cascade.errors import CascadeError, quoted
from cascade.files.text import check_regular

# --- picture ---------------------------------------------------------------------------------------------------------
# Pictures of any mode, depth and colour space -> 8 bits, sRGB, upright, the form that all other modules expect.

MOST_PIXELS = "CASCADE_MAX_PIXELS"
"""The environment variable that sets the maximum number of pixels of a picture to read."""
_MOST_PIXELS = 178_956_970
_OPENING = threading.Lock()
"""Pillow's limit and Python's warning filters belong to the process, so only one thread at a time changes them."""
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error)
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_TRANSFORM_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_SHIFTS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 257}
"""By PNG depth, Pillow's factor for grays and colours, which it does not apply to the transparent colour."""


@contextmanager
def open_picture(
    source: str | Path | BinaryIO, limited: bool = True, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """A picture file, its pixels not yet decoded. Raises Pillow's errors; see `picture_errors`.

    Pillow allows 179 million pixels, because a small file may hold a picture that fills all memory; the environment
    variable `CASCADE_MAX_PIXELS` sets another limit. limited: false for no limit. formats: Pillow's names of the
    formats to read, None for all.
    """
    with _opened(source, most_pixels() // 2 if limited else None, formats) as image:
        yield image


def _opened(source: str | Path | BinaryIO, limit: int | None, formats: tuple[str, ...] | None) -> Image.Image:
    """limit: pixels above which Pillow warns, which is suppressed; at twice as many it raises an error."""
    if isinstance(source, (str, Path)):
        check_regular(Path(source))
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = limit
        try:
            return Image.open(source, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_rgb(source: str | Path | BinaryIO, name: str) -> Image.Image:
    """RGB, sRGB, upright, transparency over white. Raises CascadeError; its message begins with `name`."""
    with picture_errors(name), open_picture(source) as image:
        return over_white(straight(image))


def size_of_picture(source: bytes | Path | Image.Image) -> tuple[int, int] | None:
    """Height and width of a picture that is shown upright, from its header; None if that cannot be read."""
    try:
        if isinstance(source, Image.Image):
            return _upright_size(source)
        with open_picture(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _upright_size(image)
    except (*_UNREADABLE, CascadeError, Image.DecompressionBombError):
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    try:
        with warnings.catch_warnings(action="ignore"):
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except SyntaxError:  # damaged EXIF
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


def most_pixels() -> int:
    """Maximum pixels of a picture to read. Raises CascadeError if the environment variable is not a number."""
    text = os.environ.get(MOST_PIXELS, "")
    if text and not (text.isascii() and text.isdecimal()):
        raise CascadeError(f"{MOST_PIXELS}: {quoted(text)}; expected a number of pixels, such as 300000000")
    return int(text) if text else _MOST_PIXELS


@contextmanager
def picture_errors(name: str) -> Iterator[None]:
    """A context in which Pillow's errors for an unreadable picture become CascadeErrors."""
    try:
        yield
    except CascadeError:
        raise
    except FileNotFoundError:
        raise CascadeError(f"{name}: no such file") from None
    except Image.DecompressionBombError:
        raise CascadeError(
            f"{name}: has more than {most_pixels():,} pixels; to read it anyway, set {MOST_PIXELS} to at least that"
        ) from None
    except _UNREADABLE as error:
        reason = "a folder" if isinstance(error, IsADirectoryError) else str(error) or type(error).__name__
        raise CascadeError(f"{name}: not a readable picture: {reason}") from None


def straight(image: Image.Image) -> Image.Image:
    """RGB, or RGBA if it has transparency: converted from its colour profile to sRGB, and upright by its EXIF.

    A damaged profile, or one for another kind of colours, is ignored; so is damaged EXIF. 16-bit gray keeps its upper
    byte. Modes `I` and `F` (int32, float32) do not define white, so the largest value determines it: white is the first
    of 1 (`F` only), 255 and 65535 that the largest value exceeds at most twofold, because sharpening may leave a few
    values beyond white, and these must not turn the rest black. Values outside the range are clipped.
    """
    profile = image.info.get("icc_profile")
    _scale_transparency(image)
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    return _srgb(image, profile) if isinstance(profile, bytes) and profile else _plain(image)


def over_white(image: Image.Image) -> Image.Image:
    """RGB of an RGB or RGBA picture over white."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG of 2, 4 or 16 bits to the 8 bits of its pixels."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []  # empty once it is decoded
    factor = _SHIFTS.get(str(tiles[0].args)) if tiles else None
    colour = image.info.get("transparency")
    if factor is None or colour is None:
        return
    scaled = tuple(int(value * factor) for value in (colour if isinstance(colour, tuple) else (colour,)))
    image.info["transparency"] = scaled if isinstance(colour, tuple) else scaled[0]


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation shows it; damaged EXIF is ignored."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about truncated EXIF
            if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                return image  # `exif_transpose` would copy it
            return ImageOps.exif_transpose(image)
    except SyntaxError:  # damaged EXIF, orientation unknown
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits as `L`, or `LA` if one gray value is transparent."""
    values = np.asarray(image)
    gray = Image.fromarray(_gray_bytes(values, image.mode))
    transparent = image.info.get("transparency")
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _gray_bytes(values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
    """The values as uint8 without Pillow's clipping at 255; see `straight`."""
    if mode.startswith("I;"):
        return (values >> 8).astype(np.uint8)
    finite = np.isfinite(values)
    largest = values.max(where=finite, initial=0)
    white = next((white for white in ((1, 255) if mode == "F" else (255,)) if largest <= 2 * white), 65535)
    numbers = np.nan_to_num(values.astype(np.float64), posinf=white, neginf=0)
    numbers = (numbers * 255).round() if white == 1 else numbers // 256 if white == 65535 else numbers
    return numbers.clip(0, 255).astype(np.uint8)


def _srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image`, converted from the colours of a profile to sRGB."""
    plain = _plain(image)
    kinds = {"GRAY": ("1", "L", "LA", "La"), "CMYK": ("CMYK",)}
    space = _space(profile)
    if image.mode not in kinds.get(space, (image.mode,) if space == "RGB" and image.mode != "CMYK" else ()):
        return plain
    source = {"GRAY": "L", "CMYK": "CMYK", "RGB": "RGB"}[space]
    transform = _transform(profile, source)
    if transform is None:
        return plain
    colours = ImageCms.applyTransform((plain if source == "RGB" else image).convert(source), transform)
    assert colours is not None, "it is not done in place"
    if plain.mode == "RGBA":
        colours.putalpha(plain.getchannel("A"))
    return colours


@lru_cache(maxsize=16)
def _space(profile: bytes) -> str:
    """The kind of colours that a profile is for: `RGB`, `GRAY`, `CMYK`; empty if it is damaged."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except _TRANSFORM_ERRORS:
        return ""


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if none is needed: the profile is damaged, or is sRGB itself."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT, flags)
    except _TRANSFORM_ERRORS:
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether colours stay within rounding, as for the many profiles that are sRGB under another name."""
    colours = np.array(list(product(range(0, 256, 51), repeat=3)), dtype=np.uint8)[None]
    changed = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return bool(np.abs(np.asarray(changed).astype(int) - colours).max() <= 1)


# --- files that a command replaces -----------------------------------------------------------------------------------
# Single files that a command writes: an existing file is replaced only if the same command wrote it.

SOFTWARE = "Software"
"""The PNG text entry that names the program that wrote the file."""


def check_png(path: Path, program: str) -> None:
    """Raises CascadeError for an existing file, unless it is a PNG that `program` wrote."""
    if not path.exists():
        return
    writer = None
    try:
        with open_picture(path, limited=False) as image:
            writer = image.info.get(SOFTWARE)
    except (OSError, ValueError, SyntaxError):
        pass
    if writer != program:
        raise CascadeError(f"{path}: exists, and `{program}` did not write it; name another file")
