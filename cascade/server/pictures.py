"""Pictures that come in and go out: looked at before they are decoded, and sent in the size and format asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cascade.batch.metadata import encode
from cascade.errors import CascadeError
from cascade.files.picture import open_picture, over_white, picture_errors, straight

MOST_PIXELS_READ = 32 << 20
"""Of a picture that somebody sends."""
_FORMATS = ("PNG", "JPEG", "WEBP")


def checked_size(content: bytes) -> tuple[int, int]:
    """Width and height as the head of a file says, before anything is decoded. Raises CascadeError."""
    try:
        with open_picture(io.BytesIO(content), limited=False, formats=_FORMATS) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise CascadeError(f"not a readable picture: expected PNG, JPEG or WebP ({type(error).__name__})") from None
    if width * height > MOST_PIXELS_READ:
        raise CascadeError(f"the picture has more than {MOST_PIXELS_READ:,} pixels")
    return width, height


def as_sent(content: bytes, said: Mapping[str, Any], size: tuple[int, int] | None, format: str) -> bytes:
    """A picture of the gallery, with what it says of itself: as it is, or smaller or in another format.

    size: height and width, None: as drawn. format: png, webp or jpeg.
    """
    with picture_errors("the picture"), open_picture(io.BytesIO(content)) as image:
        wanted = image.size if size is None else size[::-1]
        if image.size == wanted and str(image.format).lower() == format:
            return content
        plain = over_white(straight(image))
    if plain.size != wanted:
        plain = plain.resize(wanted, Image.Resampling.BOX)
    return encode(plain, said, format)[0]
