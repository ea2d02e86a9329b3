"""Received and sent pictures: checks before decoding, conversion to the requested size and format."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from cascade.batch.metadata import encode_image
from cascade.errors import CascadeError
from cascade.files.picture import open_picture, over_white, picture_errors, straight

MOST_PIXELS_READ = 32 << 20
"""Most pixels of a received picture."""
_FORMATS = ("PNG", "JPEG", "WEBP")


def checked_size(content: bytes) -> tuple[int, int]:
    """Width and height in the header of a file, without decoding it. Raises CascadeError."""
    try:
        with open_picture(io.BytesIO(content), limited=False, formats=_FORMATS) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise CascadeError(f"not a readable picture: expected PNG, JPEG or WebP ({type(error).__name__})") from None
    if width * height > MOST_PIXELS_READ:
        raise CascadeError(f"the picture has more than {MOST_PIXELS_READ:,} pixels")
    return width, height


def from_base64(text: str) -> bytes:
    """The content of a file in base64, optionally as a data URL. Raises CascadeError."""
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except ValueError:
        raise CascadeError("a picture is not base64") from None


def transparency(content: bytes) -> np.ndarray[Any, Any] | None:
    """(H, W) uint8, 255 where a picture is transparent; None without an alpha channel. Raises CascadeError."""
    checked_size(content)
    with picture_errors("the picture"), open_picture(io.BytesIO(content)) as image:
        whole = straight(image)
    return 255 - np.asarray(whole.getchannel("A")) if whole.mode == "RGBA" else None


def as_sent(content: bytes, said: Mapping[str, Any], size: tuple[int, int] | None, format: str) -> bytes:
    """A picture of the gallery with its metadata: unchanged, or in another size or format.

    size: height and width, None: as drawn. format: png, webp or jpeg.
    """
    with picture_errors("the picture"), open_picture(io.BytesIO(content)) as image:
        wanted = image.size if size is None else size[::-1]
        if image.size == wanted and str(image.format).lower() == format:
            return content
        plain = over_white(straight(image))
    if plain.size != wanted:
        smaller = wanted[0] <= plain.width and wanted[1] <= plain.height
        plain = plain.resize(wanted, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return encode_image(plain, said, format)[0]
