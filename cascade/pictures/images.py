"""Conversion of pictures (uint8, [-1, 1], PIL) and the two resizings that the cascade is built on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from cascade.pictures.reading import over_white, straight
from cascade.system.transfer import on_device

WHITE = 255
_FLATTEN_RADIUS = 2
_FLATTEN_ROUNDS = 2
_LABEL_HEIGHT = 14
_GAP = 2
_SQUARE = 8
_CHECKER = (204, 255)
"""Levels of gray of the two kinds of squares behind transparent pictures, as in most editors."""


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1], clamped there -> uint8 in 0..255, rounded half to even, any shape."""
    return ((images.to(torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def digest_of(pixels: Tensor) -> str:
    """SHA-256 of the shape, type and values of a picture, mask or vector, hexadecimal: its name in a recipe."""
    values = pixels.contiguous().numpy()
    return hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes()).hexdigest()


def from_pil(image: Image.Image) -> Tensor:
    """PIL picture of any mode -> uint8 (3, H, W), sRGB, upright, transparency over white; see `pictures.reading`."""
    # A copy, because torch requires writable memory.
    pixels = np.array(over_white(straight(image)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), uint8 or float in [-1, 1] -> B PIL pictures."""
    whole = images if images.dtype == torch.uint8 else to_uint8(images)
    pixels = whole.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]


def downsample(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Exact area mean: each pixel of the result is the mean over the rectangle that it covers.

    images: float (B, C, H, W).  size: height and width of the result, or one number for both; not larger.
    Pixels that straddle an edge count by their share. (`F.interpolate(mode="area")` counts them in full, so
    its rectangles overlap; where the sizes divide, the two agree.)
    """
    height, width = (size, size) if isinstance(size, int) else size
    old_height, old_width = images.shape[-2:]
    if height > old_height or width > old_width:
        raise ValueError(f"downsample: {height}x{width} is larger than the picture, {old_height}x{old_width}")
    if old_height % height == 0 and old_width % width == 0:
        return F.avg_pool2d(images, (old_height // height, old_width // width))
    rows = on_device(_area_weights(old_height, height).to(images.dtype), images.device)
    columns = on_device(_area_weights(old_width, width).to(images.dtype), images.device)
    return rows @ images @ columns.T


@lru_cache(maxsize=64)
def _area_weights(old: int, new: int) -> Tensor:
    """(new, old): share of each old pixel in each new one; rows sum to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * new / old


def upsample(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bicubic enlargement of the smaller picture, as every super-resolution network sees it.

    images: float (B, C, H, W).  size: height and width of the result, or one number for both.
    """
    target = (size, size) if isinstance(size, int) else size
    return F.interpolate(images, size=target, mode="bicubic", align_corners=False, antialias=False)


def back_project(images: Tensor, low: Tensor, rounds: int) -> Tensor:
    """Bring the area mean of pictures closer to the smaller pictures that they were enlarged from.

    images: (B, C, H, W) in [-1, 1], clipped to it in each round. low: (B, C, h, w). Each round adds the enlarged
    difference, bicubic rather than block by block so that no grid appears. Source: Irani & Peleg (1991).
    """
    for _ in range(rounds):
        missing = low - downsample(images, (low.shape[-2], low.shape[-1]))
        images = (images + upsample(missing, (images.shape[-2], images.shape[-1]))).clamp_(-1, 1)
    return images


def flatten(images: Tensor, tolerance: float) -> Tensor:
    """Average neighbours of nearly the same colour: grain disappears, edges and slow gradients stay.

    images: float (B, C, H, W). tolerance: neighbours within 2 pixels have the weight exp(-(d / tolerance)^2), d the
    distance of the colours; applied twice. 0 changes nothing. Source: the sigma filter (Lee 1983) with smooth weights,
    that is, the bilateral filter of Tomasi & Manduchi (1998) without a weight for the distance in space.
    """
    if not tolerance:
        return images
    height, width = images.shape[-2:]
    reach = range(2 * _FLATTEN_RADIUS + 1)
    for _ in range(_FLATTEN_ROUNDS):
        around = F.pad(images, (_FLATTEN_RADIUS,) * 4, mode="replicate")
        total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
        for top, left in product(reach, reach):
            neighbour = around[..., top : top + height, left : left + width]
            distance = (neighbour - images).square().sum(1, keepdim=True)
            weight = torch.exp(-distance / tolerance**2)
            total.addcmul_(weight, neighbour)
            weights += weight
        images = total / weights
    return images


def upsample_corners(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear enlargement that keeps corner pixels in the corners, as in the training of DeepFloyd IF's second stage.

    images: float (B, C, H, W).  size: height and width of the result.
    """
    return F.interpolate(images, size=size, mode="bilinear", align_corners=True)


def contact_sheet(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, cell: int | None = None
) -> Image.Image:
    """A grid of pictures, row by row, each with its label beneath.

    cell: width and height of the square that each picture is fitted into, in pixels; None: the largest picture's side.
    """
    if not images or columns < 1:
        raise ValueError(f"contact_sheet needs pictures and columns, got {len(images)} and {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"contact_sheet got {len(labels)} labels for {len(images)} pictures")
    cell = cell or max(max(image.size) for image in images)
    pitch_x = cell + _GAP
    pitch_y = cell + _GAP + (_LABEL_HEIGHT if labels else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * pitch_x - _GAP, rows * pitch_y - _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left, top = index % columns * pitch_x, index // columns * pitch_y
        image = opaque(image)
        fitted = image if max(image.size) == cell else ImageOps.contain(image, (cell, cell))
        sheet.paste(fitted, (left + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2))
        if labels:
            pen.text((left + 1, top + cell + 1), _shortened(labels[index], cell, pen), fill="black")
    return sheet


def opaque(image: Image.Image) -> Image.Image:
    """RGB of a picture to look at: transparent parts on a checkerboard, of 16-bit gray the upper 8 bits."""
    if image.mode in ("RGBA", "LA"):
        return over(image.convert("RGBA"), "checker")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def over(image: Image.Image, background: str) -> Image.Image:
    """RGB of an RGBA picture over `white`, or over a `checker` of light squares, 8 pixels wide or an eighth of it."""
    width, height = image.size
    behind = Image.new("RGBA", image.size, "white")
    if background == "checker":
        side = max(1, min(_SQUARE, min(width, height) // 8))
        rows, columns = np.mgrid[:height, :width] // side
        levels = np.where((rows + columns) % 2, *_CHECKER).astype(np.uint8)
        behind = Image.fromarray(levels).convert("RGBA")
    return Image.alpha_composite(behind, image).convert("RGB")


def _shortened(label: str, width: int, pen: ImageDraw.ImageDraw) -> str:
    """`label`, cut with an ellipsis where it would not fit into `width` pixels."""
    # PIL's built-in font covers little beyond ASCII; other letters become question marks.
    label = label.encode("ascii", "replace").decode("ascii")
    if pen.textlength(label) <= width:
        return label
    while label and pen.textlength(label + "...") > width:
        label = label[:-1]
    return label + "..."
