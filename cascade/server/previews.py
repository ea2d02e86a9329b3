"""Previews of unfinished pictures, small enough to be sent at every step."""

from __future__ import annotations

import base64
import io

from torch import Tensor

from cascade.drawing.edit import Box, Edit, resized
from cascade.images import downsample, to_float, to_pil, to_uint8

LARGEST = 512
"""Longest side of a preview, in pixels; the finished picture is sent as a file."""
_QUALITY = 90


class Scene:
    """A reduced copy of an edited picture, into which previews of the redrawn part are placed."""

    def __init__(self, edit: Edit) -> None:
        self._small = None if edit.mask is None else _reduced(edit, edit.mask)

    def with_part(self, picture: Tensor) -> Tensor:
        """picture: (3, H, W), uint8 or float in about [-1, 1], of the redrawn part -> itself, or uint8 of the whole."""
        if self._small is None:
            return picture
        return self._small.finished((to_uint8(picture) if picture.is_floating_point() else picture).cpu())


def _reduced(edit: Edit, mask: Tensor) -> Edit:
    height, width = edit.image.shape[-2:]
    share = min(1.0, LARGEST / max(height, width))
    size = max(1, round(height * share)), max(1, round(width * share))
    box, scale = edit.box, (size[0] / height, size[1] / width)
    top, left = (min(int(at * by), side - 1) for at, by, side in zip((box.top, box.left), scale, size, strict=True))
    part = Box(
        top,
        left,
        max(1, min(round(box.height * scale[0]), size[0] - top)),
        max(1, min(round(box.width * scale[1]), size[1] - left)),
    )
    image = to_uint8(resized(to_float(edit.image)[None], size)[0])
    return Edit(image, resized(mask[None, None], size)[0, 0].clamp(0, 1), part)


def data_url(picture: Tensor) -> str:
    """A JPEG in a data URL, from (3, H, W), uint8 or float in about [-1, 1], on any device."""
    height, width = picture.shape[-2:]
    longest = max(height, width)
    if longest > LARGEST:
        pixels = to_float(picture) if not picture.is_floating_point() else picture.float()
        size = (max(1, height * LARGEST // longest), max(1, width * LARGEST // longest))
        picture = downsample(pixels[None], size)[0]
    buffer = io.BytesIO()
    to_pil(picture[None])[0].save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
