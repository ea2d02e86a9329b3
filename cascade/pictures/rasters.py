"""Picture files of any channels and values: PNG and other usual files, TIFF, NumPy arrays, DICOM, as stored values."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import CascadeError
from cascade.files.text import check_regular
from cascade.pictures.format import NAMED, RGB, RGBA, PictureFormat, as_stored
from cascade.pictures.images import from_pil, over
from cascade.pictures.reading import most_pixels, open_picture, picture_errors, read_rgb, straight, upright

ARRAY_SUFFIXES = frozenset({".npy", ".dcm"})
"""File endings of pictures that are read for other formats than `rgb` of 8 bits, in addition to the usual ones."""
_HEAD = 132
_PNG, _NPY, _DICOM = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"DICM"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PLAIN_GRAY = ("L", "1")
_Array: TypeAlias = np.ndarray[Any, Any]

Encoded: TypeAlias = bytes | Path | Image.Image | _Array | Sequence[Any]
"""Bytes or path of a file, a PIL picture, or an array, also as nested lists."""


class WrongFormatError(ValueError):
    """A picture of other channels or values than expected, of which the message names both; or a missing decoder."""


def read_stored(source: Encoded, format: PictureFormat) -> Tensor:
    """A picture as stored values (C, H, W), upright.

    `rgb` of 8 bits takes every picture, as `images.from_pil` does; `rgba` of 8 bits takes pictures without alpha as
    opaque ones. All other formats are strict. Raises WrongFormatError for other channels or values, and what the
    decoders raise for a broken file: OSError, ValueError, SyntaxError, struct.error and more.
    """
    if isinstance(source, Image.Image):
        return from_pil(source) if format.is_rgb else _of_pil(source, format)
    if not isinstance(source, (bytes, Path)):
        return _of_array(source if isinstance(source, np.ndarray) else _from_lists(source, format), format)
    if format.is_rgb and not (isinstance(source, bytes) and source.startswith(_NPY)):
        with open_picture(_file(source)) as image:
            return from_pil(image)
    head = _head(source)
    with _decoding():
        if head.startswith(_NPY):
            return _of_array(_read_npy(source), format)
        if head.startswith(_TIFF):
            return _read_tiff(source, format)
        if head[128:] == _DICOM:
            return _of_array(_read_dicom(source, format), format)
        if _is_deep_colour(head):
            return _of_array(_read_deep_png(source, format), format)
    with open_picture(_file(source)) as image:
        return _of_pil(image, format)


@contextmanager
def _decoding() -> Iterator[None]:
    """A context in which every error of a decoder about a damaged file is a ValueError of one line.

    tifffile passes on zlib's; pydicom raises AttributeError, NotImplementedError, tokenize.TokenError and its own.
    """
    try:
        yield
    except (OSError, ValueError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"it is damaged ({type(error).__name__}: {reason})") from error


def _file(source: bytes | Path) -> Path | BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _head(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:_HEAD]
    with check_regular(source).open("rb") as file:
        return file.read(_HEAD)


def _of_array(values: _Array, format: PictureFormat, channels_last: bool = True) -> Tensor:
    try:
        return as_stored(values, format, channels_last)
    except ValueError as error:
        raise WrongFormatError(str(error)) from None


def _from_lists(values: Sequence[Any], format: PictureFormat) -> _Array:
    """Nested lists of numbers as an array of the format's type. Raises WrongFormatError where that loses values."""
    array = np.asarray(values)
    if format.values == "float32" or array.dtype.kind not in "ui":
        return array
    converted = array.astype(format.values)
    if not np.array_equal(converted, array):
        raise WrongFormatError(f"has values from {array.min()} to {array.max()}; expected {format}")
    return converted


def _of_pil(image: Image.Image, format: PictureFormat) -> Tensor:
    """A decoded picture. Gray stays gray, and no colour profile is applied to anything but `rgba`."""
    deep = image.mode.startswith("I") or image.mode == "F"
    if format.alpha and format.values == "uint8" and not deep:
        pixels = np.array(straight(image).convert("RGBA"))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if image.mode == "P" or (image.mode in _PLAIN_GRAY and image.has_transparency_data):
        words = "a palette of colours" if image.mode == "P" else "gray with a transparent value"
        raise WrongFormatError(f"has {words}; expected {format}")
    image = upright(image)
    return _of_array(np.asarray(image.convert("L") if image.mode == "1" else image), format)


def _check_size(pixels: int) -> None:
    """Raise Pillow's error for more pixels than a picture to read may have."""
    if pixels > most_pixels():
        raise Image.DecompressionBombError(f"has {pixels:,} pixels, more than {most_pixels():,}")


def _read_npy(source: bytes | Path) -> _Array:
    """A NumPy array; its header is checked first, which may state more values than the file has."""
    opened = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with opened as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise WrongFormatError("holds Python objects; expected an array of numbers")
        start, end = file.tell(), file.seek(0, io.SEEK_END)
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError("its size differs from the one in its header; it is cut off")
        file.seek(0)
        values: _Array = np.lib.format.read_array(file, allow_pickle=False)
        return values


def _read_tiff(source: bytes | Path, format: PictureFormat) -> Tensor:
    """The first picture of a TIFF, of any bands; colours that are stored multiplied by alpha are divided by it."""
    import tifffile

    with tifffile.TiffFile(_file(source)) as file:
        page, series = file.pages[0], file.series[0]
        assert isinstance(page, tifffile.TiffPage)
        _check_size(series.size // format.channels)
        parts = math.prod(page.chunked)
        if parts > file.filehandle.size:  # each has an entry in the file; tifffile would decode absent ones, too
            raise ValueError(f"its header promises {parts:,} strips or tiles, more than its bytes")
        if series.ndim > 3:
            found = " x ".join(map(str, series.shape))
            raise WrongFormatError(f"has {found} values; expected one picture of {format}")
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise WrongFormatError(f"has a palette of colours; expected {format}")
        try:
            values = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise WrongFormatError(f"{error}; install it with pip install 'cascade-diffusion[tiff]'") from None
        associated, inverted = 1 in page.extrasamples, page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if inverted and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    if page.dtype == np.dtype(bool):
        values = values.astype(np.uint8) * 255
    stored = _with_opacity(values, format, series.axes[-1:] not in ("X", "Y"))
    return format.stored(stored.float()) if format.alpha and associated else stored


def _with_opacity(values: _Array, format: PictureFormat, channels_last: bool) -> Tensor:
    """The array as stored values; one without the alpha that the format has is opaque."""
    missing = values.ndim == 3 and values.shape[-1 if channels_last else 0] == format.channels - 1
    if not format.alpha or not missing or values.dtype != format.values:
        return _of_array(values, format, channels_last)
    axis = 2 if channels_last else 0
    opaque = np.full_like(values.take([0], axis=axis), np.iinfo(values.dtype).max)
    return _of_array(np.concatenate((values, opaque), axis=axis), format, channels_last)


def _is_deep_colour(head: bytes) -> bool:
    """Whether this is a PNG of 16 bits with more than one channel, of which Pillow keeps the upper 8 bits."""
    return head.startswith(_PNG) and len(head) > 25 and head[24] == 16 and head[25] != 0


def _read_deep_png(source: bytes | Path, format: PictureFormat) -> _Array:
    if format.values == "uint8":
        raise WrongFormatError(f"has values of 16 bits; expected {format}")
    try:
        import imagecodecs
    except ImportError:
        raise WrongFormatError(
            "a PNG of 16 bits in colour needs imagecodecs: pip install 'cascade-diffusion[tiff]', or store it as TIFF"
        ) from None
    content = source if isinstance(source, bytes) else source.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    _check_size(width * height)
    decoded: _Array = imagecodecs.png_decode(content)
    return decoded


def _read_dicom(source: bytes | Path, format: PictureFormat) -> _Array:
    """A DICOM picture: for float32 its rescaled values, such as Hounsfield units; else its window over the whole type.

    Without a window, values of 8 or 16 bits stay as stored. Source: DICOM PS3.3 C.11.1 (rescale), C.11.2.1.2 (window).
    """
    try:
        import pydicom
    except ImportError:
        raise WrongFormatError("DICOM needs pydicom: pip install 'cascade-diffusion[dicom]'") from None
    from pydicom.pixels.processing import apply_modality_lut

    data = pydicom.dcmread(_file(source))
    _check_size(int(data.Rows) * int(data.Columns))
    raw: _Array = data.pixel_array
    inverted = data.PhotometricInterpretation == "MONOCHROME1"
    if format.values == "float32":
        return apply_modality_lut(raw, data).astype(np.float32)
    most = float(np.iinfo(format.values).max)
    if "WindowCenter" not in data:
        if raw.dtype != format.values:
            raise WrongFormatError(
                f"has values of {raw.dtype} and no window; expected {format}, or use values: float32"
            )
        return np.iinfo(raw.dtype).max - raw if inverted else raw
    center, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    shares = (apply_modality_lut(raw, data) - (center - 0.5)) / max(width - 1, 1) + 0.5
    shares = shares.clip(0, 1)
    windowed: _Array = ((1 - shares if inverted else shares) * most).round().astype(format.values)
    return windowed


def read_given(image: Image.Image | str | bytes | _Array, format: PictureFormat, name: str) -> Tensor:
    """A caller's picture, its file or its array as stored values (C, H, W). Raises CascadeError.

    name: for messages about what is not a file.
    """
    named = image if isinstance(image, str) else name
    with picture_errors(named):
        try:
            return read_stored(Path(image) if isinstance(image, str) else image, format)
        except WrongFormatError as error:
            raise CascadeError(f"{named}: {error}") from None


# --- showing ---------------------------------------------------------------------------------------------------------

Background: TypeAlias = Literal["white", "checker", "none"]
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
_PIL_MODES = {("rgb", "uint8"): "RGB", ("gray", "uint8"): "L", ("rgba", "uint8"): "RGBA", ("gray", "uint16"): "I;16"}


def has_pil_mode(format: PictureFormat) -> bool:
    """Whether a PIL picture can hold the values unchanged."""
    return (format.kind, format.values) in _PIL_MODES


def as_pil(stored: Tensor, format: PictureFormat) -> Image.Image:
    """A stored picture (C, H, W) as a PIL picture of the same values. Raises CascadeError where there is no such."""
    if not has_pil_mode(format):
        raise CascadeError(f"a PIL picture cannot hold {format}; use TIFF, NumPy arrays (np) or tensors (pt)")
    pixels = np.ascontiguousarray(stored.permute(1, 2, 0).cpu().numpy())
    return Image.fromarray(pixels if format.channels > 1 else pixels[..., 0])


def shown(stored: Tensor, format: PictureFormat, background: Background = "checker") -> Image.Image:
    """A stored picture (C, H, W) as one to look at, in 8 bits: the range from black to white, RGB.

    Of named bands, those called red, green and blue are shown, else the first three, else the first in gray.
    Transparent parts show the background; `none` leaves RGBA.
    """
    if format.alpha:
        whole = as_pil(RGBA.from_float(format.to_float(stored)), RGBA)
        return whole if background == "none" else over(whole, background)
    if format.is_rgb:
        return as_pil(stored, RGB)
    levels = RGB.from_float(format.to_float(stored))
    return as_pil(levels[list(_visible(format))], RGB)


def shown_file(content: bytes, name: str, format: PictureFormat) -> Image.Image:
    """`shown` of the picture in a file. Raises CascadeError for a damaged one; its message begins with `name`."""
    if format.is_rgb:
        return read_rgb(io.BytesIO(content), name)
    return shown(read_given(content, format, name), format)


def _visible(format: PictureFormat) -> tuple[int, int, int]:
    """The channels to show as red, green and blue."""
    names = [band.lower() for band in format.bands]
    if all(name in names for name in NAMED["rgb"]):
        red, green, blue = (names.index(name) for name in NAMED["rgb"])
        return red, green, blue
    return (0, 1, 2) if format.channels >= 3 else (0, 0, 0)


# --- writing ---------------------------------------------------------------------------------------------------------

ARRAY_FORMATS = {"tiff": "tif", "npy": "npy"}
"""File formats that hold every picture unchanged, and their file name endings."""


def file_formats(format: PictureFormat) -> tuple[str, ...]:
    """The file formats that hold pictures of a format, the preferred one first."""
    usual = {"RGB": ("png", "webp", "jpeg"), "L": ("png", "jpeg"), "RGBA": ("png", "webp"), "I;16": ("png",)}
    mode = _PIL_MODES.get((format.kind, format.values))
    return (*(usual[mode] if mode else ()), *ARRAY_FORMATS)


def write_array(file: BinaryIO, stored: Tensor, format: PictureFormat, file_format: str, text: str) -> None:
    """Write a stored picture (C, H, W) as TIFF, with `text` as its description, or as .npy (H, W, C), without.

    text: ASCII.
    """
    pixels = stored.permute(1, 2, 0).cpu().numpy()
    pixels = np.ascontiguousarray(pixels if format.channels > 1 else pixels[..., 0])
    if file_format == "npy":
        np.lib.format.write_array(file, pixels, allow_pickle=False)
        return
    import tifffile

    colour = format.kind in ("rgb", "rgba")
    more = format.channels - (3 if colour else 1)
    tifffile.imwrite(
        file,
        pixels,
        photometric="rgb" if colour else "minisblack",
        planarconfig="contig" if format.channels > 1 else None,
        extrasamples=["unassalpha"] if format.alpha else [0] * more or None,
        compression="zlib",
        predictor=format.values != "float32",
        description=text,
        metadata=None,
        software="cascade",
    )


def array_format(source: str | Path | BinaryIO) -> str | None:
    """`tiff` or `npy`; None for any other file. Raises CascadeError for a file that cannot be read."""
    if not isinstance(source, (str, Path)):
        head = source.read(_HEAD)
        source.seek(0)
    else:
        with picture_errors(str(source)):
            head = _head(Path(source))
    return "npy" if head.startswith(_NPY) else "tiff" if head.startswith(_TIFF) else None


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture file that `write_array` or Pillow wrote. Raises OSError, ValueError."""
    match array_format(path):
        case "npy":
            height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return int(width), int(height)
        case "tiff":
            import tifffile

            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                assert isinstance(page, tifffile.TiffPage)
                return page.imagewidth, page.imagelength
        case _:
            with open_picture(path, limited=False) as image:
                return image.size


def array_text(source: str | Path | BinaryIO) -> str:
    """The description of a TIFF. Raises OSError, ValueError for a damaged one."""
    import tifffile

    with _decoding(), tifffile.TiffFile(source) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        return page.description
