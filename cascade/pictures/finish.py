"""What is done to a drawn picture before it becomes a file: a palette, enlargement by a whole number, a background."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import CascadeError, quoted
from cascade.files.paths import path_of
from cascade.files.text import NotTextError, read_text
from cascade.pictures.format import RGB, PictureFormat
from cascade.pictures.images import from_pil
from cascade.pictures.rasters import BACKGROUNDS, Background, as_pil, shown
from cascade.pictures.reading import open_picture, picture_errors, straight

_Array: TypeAlias = np.ndarray[Any, Any]
Palette: TypeAlias = int | tuple[str, ...] | None
"""A number of colours to choose for each picture, or the colours as `#rrggbb`; None: any colours."""

MOST_COLOURS = 256
MOST_SCALE = 64
_ROUNDS = 20
_HEX = re.compile(r"#?([0-9a-fA-F]{6})(?:[fF]{2})?")
_TRIPLE = re.compile(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})(?:\s|$)")
# Source: Björn Ottosson (2020), "A perceptual color space for image processing": linear sRGB to LMS, LMS' to Lab.
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True)
class Finish:
    """The changes, in this order: palette, scale, background. The default changes nothing.

    scale: each pixel becomes a square of this side, without smoothing. background: behind transparent parts.
    """

    palette: Palette = None
    scale: int = 1
    background: Background = "none"

    def described(self) -> dict[str, Any]:
        """The entries of a picture's metadata and of a run's settings; none for what is as by default."""
        palette = list(self.palette) if isinstance(self.palette, tuple) else self.palette
        every = {"palette": palette, "scale": self.scale, "background": self.background}
        return {name: value for name, value in every.items() if value != getattr(Finish, name)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `described`; other entries are ignored. Raises CascadeError for values that are none."""
        palette, scale = data.get("palette"), data.get("scale", 1)
        colours = tuple(palette) if isinstance(palette, (list, tuple)) else palette
        behind = data.get("background", "none")
        background: Background | None = next((one for one in BACKGROUNDS if one == behind), None)
        if background is None:
            raise CascadeError(f"background: {quoted(behind)}; expected one of {', '.join(BACKGROUNDS)}")
        if type(scale) is not int or not 1 <= scale <= MOST_SCALE:
            raise CascadeError(f"scale: {quoted(scale)}; expected a whole number from 1 to {MOST_SCALE}")
        known = colours is None or (type(colours) is int and 2 <= colours <= MOST_COLOURS)
        if not known and not (isinstance(colours, tuple) and all(_HEX.fullmatch(str(one)) for one in colours)):
            raise CascadeError(f"palette: {quoted(palette)}; expected 2 to {MOST_COLOURS} colours, or a palette file")
        return cls(colours, scale, background)

    def check(self, format: PictureFormat) -> None:
        """Raises CascadeError for changes that pictures of a format cannot have."""
        if self.background != "none" and not format.alpha:
            raise CascadeError(f"background: pictures of {format} have no transparency; leave it out")
        if self.palette is not None and (format.kind not in ("rgb", "rgba") or format.values != "uint8"):
            raise CascadeError(f"palette: is for rgb and rgba of uint8, not {format}; leave it out")

    def result(self, format: PictureFormat) -> PictureFormat:
        """The format of finished pictures."""
        return RGB if self.background != "none" and format.alpha else format

    def __call__(self, stored: Tensor, format: PictureFormat) -> Tensor:
        """A stored picture (C, H, W) of `format` -> a finished one, of `result(format)`."""
        if self.palette is not None:
            stored = limited(stored, self.palette)
        stored = repeated(stored, self.scale)
        return from_pil(shown(stored, format, self.background)) if self.result(format) != format else stored

    def image(self, stored: Tensor, format: PictureFormat) -> Image.Image:
        """The finished picture as a PIL picture."""
        return as_pil(self(stored, format), self.result(format))


def repeated(stored: Tensor, scale: int) -> Tensor:
    """A picture (C, H, W) in which each pixel has become a square of side `scale`."""
    if scale == 1:
        return stored
    return torch.from_numpy(stored.numpy().repeat(scale, axis=1).repeat(scale, axis=2))


def limited(stored: Tensor, palette: int | tuple[str, ...]) -> Tensor:
    """A picture (3 or 4, H, W) uint8 with each colour replaced by the nearest of a palette, in Oklab; alpha stays.

    A number: that many colours are chosen for this picture, see `chosen`.
    """
    pixels = stored[:3].permute(1, 2, 0).reshape(-1, 3).numpy()
    visible = stored[3].flatten().numpy() > 0 if len(stored) == 4 else np.ones(len(pixels), bool)
    if isinstance(palette, int):
        colours = chosen(pixels[visible], palette)
    else:
        colours = np.array([bytes.fromhex(hex_of(one)) for one in palette], dtype="S3").view(np.uint8).reshape(-1, 3)
    own, where = np.unique(pixels[visible], axis=0, return_inverse=True)
    new = np.zeros_like(pixels)
    if len(own):
        new[visible] = colours[_nearest(oklab(own), oklab(colours))][where.reshape(-1)]
    return torch.cat((torch.from_numpy(new.T.reshape(3, *stored.shape[1:])), stored[3:]))


def chosen(pixels: _Array, count: int) -> _Array:
    """`count` colours (n, 3) uint8 for pixels (N, 3) uint8, fewer if there are fewer: k-means in Oklab.

    It starts with Pillow's median cut and has no randomness. Source: Lloyd (1982).
    """
    own, times = np.unique(pixels, axis=0, return_counts=True)
    if len(own) <= count:
        return own
    start = Image.fromarray(pixels[None]).quantize(count, Image.Quantize.MEDIANCUT)
    used = sorted({int(index) for index in np.unique(np.asarray(start))})
    centres = np.array(start.getpalette(), np.uint8).reshape(-1, 3)[used].astype(np.float64)
    places, rgb = oklab(own), own.astype(np.float64)
    for _ in range(_ROUNDS):
        nearest = _nearest(places, oklab(centres))
        sums = np.zeros((len(centres), 4))
        np.add.at(sums, nearest, np.concatenate((rgb, np.ones((len(rgb), 1))), axis=1) * times[:, None])
        means = np.where(sums[:, 3:] > 0, sums[:, :3] / np.maximum(sums[:, 3:], 1), centres)
        if np.array_equal(means, centres):
            break
        centres = means
    return np.unique(centres.round().astype(np.uint8), axis=0)


def _nearest(places: _Array, centres: _Array) -> _Array:
    """The index of the nearest centre of each place."""
    distances = np.stack([np.square(places - centre).sum(axis=1) for centre in centres])
    return distances.argmin(axis=0)


def oklab(colours: _Array) -> _Array:
    """sRGB in 0..255, (N, 3) -> Oklab, (N, 3), where equal distances look about equally far."""
    values = colours.astype(np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab: _Array = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    return lab


def hex_of(colour: str) -> str:
    """The six digits of `#rrggbb`."""
    match = _HEX.fullmatch(colour)
    assert match, "checked when it was read"
    return match[1]


def read_palette(given: str) -> Palette:
    """The palette of an option: a number of colours, or a file of them.

    Files: lines of `rrggbb` (.hex of Lospec), GIMP's .gpl, JASC's .pal, or a picture with at most 256 colours.
    Raises CascadeError for other files, naming what was expected.
    """
    if given.isascii() and given.isdecimal():
        return Finish.of({"palette": int(given)}).palette
    path = path_of(given)
    if path.suffix.lower() in (".hex", ".gpl", ".pal", ".txt"):
        colours = _listed(path)
    else:
        with picture_errors(f"palette {path}"), open_picture(path) as image:
            pixels = np.asarray(straight(image).convert("RGBA")).reshape(-1, 4)
        own = np.unique(pixels[pixels[:, 3] > 0, :3], axis=0)
        colours = [bytes(colour.tolist()).hex() for colour in own]
    found = tuple(dict.fromkeys(f"#{colour.lower()}" for colour in colours))
    if not 1 <= len(found) <= MOST_COLOURS:
        raise CascadeError(f"palette {path}: has {len(found):,} colours; expected 1 to {MOST_COLOURS}")
    return found


def _listed(path: Path) -> list[str]:
    """The colours in the lines of a text file, six digits each."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise CascadeError(f"palette {path}: cannot be read: {error.strerror or error}") from None
    except NotTextError as error:
        raise CascadeError(f"palette {path}: {error}") from None
    colours = []
    for line in map(str.strip, lines):
        digits, triple = _HEX.fullmatch(line), _TRIPLE.match(line)
        if digits:
            colours.append(digits[1])
        elif triple and all(int(value) < 256 for value in triple.groups()):
            colours.append(bytes(int(value) for value in triple.groups()).hex())
    return colours
