"""What a picture looks like while it is drawn, small enough to be sent at every step."""

from __future__ import annotations

import base64
import io

from torch import Tensor

from cascade.images import downsample, to_float, to_pil

LARGEST = 512
"""Longest side of a preview, in pixels; the finished picture is sent as a file."""
_QUALITY = 90


def data_url(picture: Tensor) -> str:
    """A JPEG in a URL, from (3, H, W), uint8 or float in about [-1, 1], on whatever device."""
    height, width = picture.shape[-2:]
    longest = max(height, width)
    if longest > LARGEST:
        pixels = to_float(picture) if not picture.is_floating_point() else picture.float()
        size = (max(1, height * LARGEST // longest), max(1, width * LARGEST // longest))
        picture = downsample(pixels[None], size)[0]
    buffer = io.BytesIO()
    to_pil(picture[None])[0].save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
