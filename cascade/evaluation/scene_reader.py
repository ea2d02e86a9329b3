"""Reader of drawn scenes: the background and the objects of a picture, each with shape, colour, place and size.

It uses no network. The background is the most frequent colour of the border, and objects are connected regions that
differ from it. An object's shape and colour are those whose drawing, aligned by area and centre of mass, differs least
from the region. Area and centre are used because, unlike the outline, they do not change under blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade.data.scenes import (
    COLOURS,
    CROWDING,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    WHITE,
    Relation,
    Scene,
    SceneObject,
    Size,
    draw,
)
from cascade.pictures.images import downsample, from_pil, upsample

RESOLUTION = 64
"""The resolution to which pictures of any size are resized."""

_PALETTE = {"white": WHITE, **COLOURS}
_COLOURS = torch.tensor(list(_PALETTE.values()), dtype=torch.float32)
_NAMES = tuple(_PALETTE)
_LEAST_CONTRAST = 30.0  # distance from the background in RGB; the two nearest colours of the palette are 87 apart
_LEAST_AREA = 7  # pixels; the smallest drawn shape, one of four small stars, has 15
_CANDIDATES = 3  # colours tried with every shape
_BLURS = (0.0, 0.6, 1.0, 1.4, 1.9)  # pixels, standard deviation
_MASK_SIZE, _MASK_RADIUS = 96, 0.4


@dataclass(frozen=True)
class Found:
    """A recognized object: centre x, y and half width of its box, in the unit square."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        """The nearest key of `PLACES`."""
        return min(PLACES, key=lambda name: math.dist(PLACES[name], (self.x, self.y)))

    def size(self, count: int) -> Size:
        """The nearest size, among `count` objects."""
        crowding = CROWDING.get(count, CROWDING[max(CROWDING)])
        return min(SIZES, key=lambda name: abs(math.log(self.radius / (SIZES[name] * crowding))))


@dataclass(frozen=True)
class Reading:
    """The background's colour and the objects, from left to right."""

    background: str
    objects: tuple[Found, ...]


def relation(first: Found, second: Found) -> Relation:
    """Position of `first` relative to `second`, along the axis in which they differ more."""
    dx, dy = first.x - second.x, first.y - second.y
    forward: Relation = "left of" if abs(dx) >= abs(dy) else "above"
    return forward if (dx if abs(dx) >= abs(dy) else dy) < 0 else OPPOSITE[forward]


def read_scene(picture: Image.Image) -> Reading:
    """Read a picture of any size."""
    pixels = _at_resolution(from_pil(picture).float())
    ground = _ground(pixels)
    ground_colour = _border(pixels)[_labels(_border(pixels)) == ground].median(dim=0).values
    parts = _regions(_differs(pixels, ground_colour))
    found = [_fit(pixels, ground_colour, ground, part, parts) for part in parts]
    return Reading(_NAMES[ground], tuple(sorted(found, key=lambda item: (item.x, item.y))))


def _at_resolution(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (3, 64, 64), in 0..255."""
    resize = downsample if min(pixels.shape[-2:]) >= RESOLUTION else upsample
    return resize(pixels[None], RESOLUTION)[0].clamp(0, 255)


def _labels(colours: Tensor) -> Tensor:
    """(N, 3) -> (N,): the index of the nearest colour of the palette."""
    return torch.cdist(colours, _COLOURS).argmin(dim=1)


def _border(pixels: Tensor) -> Tensor:
    """(3, H, W) -> (N, 3): the outermost pixels."""
    rows = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], dim=1)
    return rows.T


def _ground(pixels: Tensor) -> int:
    """The palette index of the most frequent colour of the border."""
    return int(_labels(_border(pixels)).mode().values)


def _differs(pixels: Tensor, ground: Tensor) -> Tensor:
    """(H, W): mask of object pixels, which are nearer to the strongest contrast around them than to the background."""
    contrast = (pixels - ground[:, None, None]).norm(dim=0)[None, None]
    around = F.max_pool2d(contrast, 7, stride=1, padding=3)
    return (contrast > (0.47 * around).clamp(min=_LEAST_CONTRAST))[0, 0]


def _regions(mask: Tensor) -> list[Tensor]:
    """Connected regions (4 neighbours) of an (H, W) mask, without the tiny ones.

    Every pixel takes the largest label among its neighbours until nothing changes; at 64 pixels this is fast enough to
    avoid a dependency on SciPy.
    """
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        across = F.max_pool2d(numbers[None, None], (1, 3), stride=1, padding=(0, 1))
        down = F.max_pool2d(numbers[None, None], (3, 1), stride=1, padding=(1, 0))
        grown = torch.maximum(across, down)[0, 0] * mask
        if torch.equal(grown, numbers):
            break
        numbers = grown
    names, areas = numbers[mask].unique(return_counts=True)
    return [numbers == name for name, area in zip(names, areas, strict=True) if area >= _LEAST_AREA]


def _fit(pixels: Tensor, ground: Tensor, ground_label: int, part: Tensor, parts: Sequence[Tensor]) -> Found:
    """The shape and colour that explain a region best."""
    others = torch.stack([torch.zeros_like(part), *(other for other in parts if other is not part)]).any(dim=0)
    own = _grown(part, 2) & ~_grown(others, 1)
    if not own.any():
        own = part  # too thin, and too near to others, for a smaller mask
    rows, columns = _window(own)
    own, core = own[rows, columns], _core(part[rows, columns])
    difference = (pixels - ground[:, None, None])[:, rows, columns]
    best, best_error = None, math.inf
    for label in _likely_colours(difference[:, own], ground, ground_label):
        direction = (_COLOURS[label] - ground)[:, None, None]
        share = (difference * direction).sum(dim=0) / direction.square().sum()
        for strength in _strengths(share[core]):
            x, y, radius = _placed(share * own / strength, rows.start, columns.start)
            shapes = _drawn(x - columns.start, y - rows.start, radius, own.shape)
            for blur in _BLURS:
                predicted = strength * _blurred(shapes, blur)[:, None] * direction
                errors = ((difference - predicted).square().sum(dim=1) * own).sum(dim=(1, 2))
                index = int(errors.argmin())
                if float(errors[index]) < best_error:
                    best_error = float(errors[index])
                    place = [float(values[index]) / RESOLUTION for values in (x, y, radius)]
                    best = Found(SHAPES[index], _NAMES[label], *place)
    assert best is not None, "every region has likely colours"
    return best


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """An (H, W) mask, dilated by some pixels on every side."""
    size = 2 * pixels + 1
    return F.max_pool2d(mask[None, None].float(), size, stride=1, padding=pixels)[0, 0] > 0


def _core(mask: Tensor) -> Tensor:
    """An (H, W) mask, eroded by two pixels on every side, which excludes edges."""
    return ~_grown(~mask, 2)


def _strengths(share: Tensor) -> list[float]:
    """Candidate strengths of an object's colour: 1, or the median of its core, from shares (N,)."""
    if len(share) < _LEAST_AREA:
        return [1.0]
    return [1.0, float(share.median().clamp(0.75, 1.25))]


def _window(mask: Tensor) -> tuple[slice, slice]:
    """The bounding rows and columns of an (H, W) mask."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _likely_colours(difference: Tensor, ground: Tensor, ground_label: int) -> list[int]:
    """Indices of the likeliest colours, for which the pixels are on the line from the background, likeliest first.

    difference: (3, N), pixels minus background. An edge mixes both colours, so it is on that line, not at its end.
    """
    directions = _COLOURS - ground  # (C, 3)
    share = (directions @ difference / directions.square().sum(dim=1, keepdim=True).clamp(min=1)).clamp(0, 1.2)
    missed = (difference[None] - share[:, None] * directions[:, :, None]).square().sum(dim=(1, 2))
    missed[ground_label] = math.inf
    missed[_NAMES.index("white")] = math.inf  # no shape is white
    return missed.argsort()[:_CANDIDATES].tolist()


def _placed(share: Tensor, top: int, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and radius, in pixels of the picture, that give each shape the region's area and centre of mass.

    share: (h, w), how much of each pixel the object covers; its window starts at (top, left).
    """
    _, areas, centres = _masks()
    total = share.sum().clamp(min=1)
    rows = torch.arange(share.shape[0]) + top + 0.5
    columns = torch.arange(share.shape[1]) + left + 0.5
    radius = (total / areas).sqrt()
    x = (share.sum(dim=0) * columns).sum() / total - centres[:, 0] * radius
    y = (share.sum(dim=1) * rows).sum() / total - centres[:, 1] * radius
    return x, y, radius


def _drawn(x: Tensor, y: Tensor, radius: Tensor, size: Sequence[int], fine: int = 4) -> Tensor:
    """Every shape at its position: (shapes, h, w), covered share of each pixel, from `fine`^2 samples per pixel."""
    masks, _, _ = _masks()
    rows = (torch.arange(size[0] * fine) + 0.5) / fine
    columns = (torch.arange(size[1] * fine) + 0.5) / fine
    # In a mask's own coordinates, [-1, 1] from edge to edge, the box has half the width 2 * _MASK_RADIUS.
    across = (columns[None] - x[:, None]) / radius[:, None] * 2 * _MASK_RADIUS
    down = (rows[None] - y[:, None]) / radius[:, None] * 2 * _MASK_RADIUS
    across, down = torch.broadcast_tensors(across[:, None, :], down[:, :, None])
    sampled = F.grid_sample(masks, torch.stack([across, down], dim=-1), align_corners=False)
    return F.avg_pool2d(sampled, fine)[:, 0]


def _blurred(shapes: Tensor, deviation: float) -> Tensor:
    """(shapes, h, w) blurred by a Gaussian with this deviation in pixels."""
    if deviation == 0:
        return shapes
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    weights = weights / weights.sum()
    shapes = F.conv2d(shapes[:, None], weights.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(shapes, weights.view(1, 1, -1, 1), padding=(reach, 0))[:, 0]


@lru_cache
def _masks() -> tuple[Tensor, Tensor, Tensor]:
    """For every shape: mask (S, 1, M, M), area (S,) and centre of mass (S, 2) for a box of half width 1."""
    pictures = []
    for shape in SHAPES:
        item = SceneObject(shape, "black", "large", 0.5, 0.5, _MASK_RADIUS)
        pictures.append(from_pil(draw(Scene((item,)), _MASK_SIZE)).float().mean(dim=0))
    black = float(sum(COLOURS["black"])) / 3
    masks = (255 - torch.stack(pictures)) / (255 - black)
    total = masks.sum(dim=(1, 2))
    places = ((torch.arange(_MASK_SIZE) + 0.5) / _MASK_SIZE - 0.5) / _MASK_RADIUS
    x = (masks.sum(dim=1) * places).sum(dim=1) / total
    y = (masks.sum(dim=2) * places).sum(dim=1) / total
    return masks[:, None], total / (_MASK_SIZE * _MASK_RADIUS) ** 2, torch.stack([x, y], dim=1)
