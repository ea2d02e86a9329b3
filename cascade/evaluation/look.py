"""Measures of a drawing's appearance: flat fills, sharp edges, few colours, and patches similar to true pictures'.

Pure functions. Pictures are uint8 (N, 3, H, W) of one size; random numbers are drawn from a given generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.evaluation.distances import sliced_wasserstein
from cascade.evaluation.tower import Tower
from cascade.pictures.images import downsample, to_float, upsample

_FLAT = 2
"""A pixel is flat when no channel differs by this much, of 255, from the pixel to its right or below it."""
_CONTRAST = 32
"""Least difference in gray levels between both sides of an edge; fainter edges are ignored."""
_REACH = 12
"""Search range for an edge's sides, in pixels on each side."""
_MOST_EDGES = 2000
_COLOUR_STEP = 8
_COVERED = 0.9
_PLAIN = 16
"""A patch whose channels all vary by less than this, of 255, is plain."""
_NEIGHBOURHOOD = 7
_LEVELS = 4
_BATCH = 256
_GRAY = (0.299, 0.587, 0.114)
_SCALE_ENDS = (2, 6, 10)
"""The tower's layers that end its three finest scales."""
_SMALL = 0.02
"""Scale in the logarithm of differences between neighbouring positions of a channel, whose spread is about 1.

Chosen on drawings of the fourth bundled cascade, so that their mottled fills are farther than a light blur."""
_BLUR = 0.6
"""Standard deviation in pixels: barely visible, and by every distance between true pictures and the drawings of the
fourth bundled cascade."""


# --- one number a picture --------------------------------------------------------------------------------


def flatness(pictures: Tensor) -> Tensor:
    """(N,): share of the pixels, but the last row and column, that do not differ from their neighbours."""
    whole = pictures.short()
    corner = whole[..., :-1, :-1]
    right, beneath = (whole[..., :-1, 1:] - corner).abs(), (whole[..., 1:, :-1] - corner).abs()
    return (torch.maximum(right, beneath).amax(dim=1) < _FLAT).double().mean(dim=(1, 2))


def colours(pictures: Tensor) -> Tensor:
    """(N,): number of colours, in steps of 8 of 255, that cover nine tenths of the area."""
    numbers = []
    for picture in pictures:
        red, green, blue = (picture // _COLOUR_STEP).long()
        _, areas = torch.unique((red * 32 + green) * 32 + blue, return_counts=True)
        covered = areas.sort(descending=True).values.cumsum(0)
        numbers.append(int((covered < _COVERED * covered[-1]).sum()) + 1)
    return torch.tensor(numbers, dtype=torch.float64)


def edge_width(pictures: Tensor) -> Tensor:
    """(N,): pixels from 10 % to 90 % of an edge's rise, the median over a picture's edges; NaN where it has none.

    An edge is where gray changes most along a row (or column) and changes less across. Its sides are where gray stops
    rising. A hard step has width 0.8, a step anti-aliased over two pixels up to 1.6.
    """
    widths = []
    for picture in pictures:
        gray = (picture.float() * torch.tensor(_GRAY)[:, None, None]).sum(dim=0)
        found = torch.cat([_widths(gray), _widths(gray.T.contiguous())])
        widths.append(found.median().double() if len(found) else torch.tensor(torch.nan, dtype=torch.float64))
    return torch.stack(widths)


def _widths(gray: Tensor) -> Tensor:
    """10-90 % widths of the edges that cross rows of a gray picture (H, W): (edges,)."""
    profiles = _profiles(gray)
    rise = profiles.diff(dim=1)  # (edges, 2 reach + 1); the middle one is the steepest and positive
    middle = _REACH
    after = rise[:, middle + 1 :].clamp(min=0) * _unbroken(rise[:, middle + 1 :] > 0)
    before = rise[:, :middle].flip(1).clamp(min=0) * _unbroken(rise[:, :middle].flip(1) > 0)
    steps = torch.cat([before.flip(1), rise[:, middle : middle + 1], after], dim=1)
    heights = steps.cumsum(dim=1)
    contrast = heights[:, -1]
    low, high = 0.1 * contrast[:, None], 0.9 * contrast[:, None]
    inside = (torch.minimum(heights, high) - torch.maximum(heights - steps, low)).clamp(min=0)
    width = (inside / steps.clamp(min=1e-6)).sum(dim=1)
    return width[contrast >= _CONTRAST]


def _profiles(gray: Tensor) -> Tensor:
    """Gray along the row around each edge, flipped to rise: (edges, 2 reach + 2). At most 2,000, evenly spaced."""
    width = gray.shape[1]
    padded = F.pad(gray[None, None], (_REACH, _REACH + 1, 0, 1), mode="replicate")[0, 0]
    along = padded[:-1].diff(dim=1)
    before, steep, after = (along[:, _REACH + shift :][:, :width].abs() for shift in (-1, 0, 1))
    across = padded.diff(dim=0)[:, _REACH:][:, :width].abs()
    is_edge = (steep >= 1) & (steep > before) & (steep >= after) & (steep > 2 * across)
    rows, columns = is_edge.nonzero(as_tuple=True)
    if len(rows) > _MOST_EDGES:
        chosen = torch.linspace(0, len(rows) - 1, _MOST_EDGES).long()
        rows, columns = rows[chosen], columns[chosen]
    places = columns[:, None] + torch.arange(2 * _REACH + 2)
    return padded[rows[:, None], places] * along[rows, columns + _REACH].sign()[:, None]


def _unbroken(rising: Tensor) -> Tensor:
    """1 up to the first position that does not rise, then 0."""
    return rising.long().cumprod(dim=1)


# --- patches, as sets ------------------------------------------------------------------------------------


def patches(pictures: Tensor, size: int, most: int, rng: torch.Generator) -> Tensor:
    """uint8 (M, 3, size, size): up to `most` patches of each picture that are not plain, evenly spaced.

    Neighbouring patches overlap by half. A plain picture has no patches.
    """
    chosen = []
    for picture in pictures:
        grid = picture.unfold(1, size, size // 2).unfold(2, size, size // 2).flatten(1, 2).transpose(0, 1)
        flat = grid.flatten(2)
        shows = (flat.amax(dim=2).short() - flat.amin(dim=2).short()).amax(dim=1) >= _PLAIN
        numbers = shows.nonzero()[:, 0]
        chosen.append(grid[numbers[torch.randperm(len(numbers), generator=rng)[:most]]])
    return torch.cat(chosen)


@torch.inference_mode()
def patch_features(patches: Tensor, tower: Tower) -> Tensor:
    """(M, 176): variation of the tower's channels between neighbouring positions of a patch, at three fine scales.

    The mean of the logarithm of differences: it separates an almost flat fill from a flat one, as the eye does, without
    being dominated by edges, which are few positions. The channels' means would barely change for a blurred edge.
    """
    rows = []
    for start in range(0, len(patches), _BATCH):
        x = to_float(patches[start : start + _BATCH]).to(memory_format=torch.channels_last)
        changes = []
        for number, layer in enumerate(list(tower.image.layers)[: _SCALE_ENDS[-1] + 1]):
            x = layer(x)
            if number in _SCALE_ENDS:
                changes.append(sum((x.diff(dim=way).abs() / _SMALL).log1p().mean(dim=(2, 3)) for way in (2, 3)))
        rows.append(torch.cat(changes, dim=1))
    return torch.cat(rows)


def neighbourhoods(pictures: Tensor, count: int, rng: torch.Generator) -> list[Tensor]:
    """7 x 7 pixels of each level of a Laplacian pyramid, finest first: a list of (N count, 147), float32.

    The last level is the remaining small picture. In pixels of the full picture, the neighbourhoods of the levels are
    7, 14, 28 and 56 wide. Source: Karras et al. (2018), arXiv:1710.10196, section 5.
    """
    levels: dict[int, list[Tensor]] = {}
    for picture in pictures:
        x = to_float(picture)[None]
        for level in range(_LEVELS):
            last = level == _LEVELS - 1 or x.shape[-1] < 2 * _NEIGHBOURHOOD
            small = x if last else downsample(x, x.shape[-1] // 2)
            detail = x if last else x - upsample(small, x.shape[-1])
            levels.setdefault(level, []).append(_cut(detail[0], count, rng))
            if last:
                break
            x = small
    return [torch.cat(parts) for parts in levels.values()]


def _cut(picture: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` squares of 7 x 7 pixels at random positions of (3, S, S): (count, 147)."""
    tops, lefts = torch.randint(picture.shape[-1] - _NEIGHBOURHOOD + 1, (2, count), generator=rng)
    span = torch.arange(_NEIGHBOURHOOD)
    squares = picture[:, (tops[:, None] + span)[:, :, None], (lefts[:, None] + span)[:, None, :]]
    return squares.transpose(0, 1).flatten(1)


def feature_distance(ours: Tensor, others: Tensor, rng: torch.Generator) -> float:
    """Sliced Wasserstein distance of two sets of features, each feature scaled by its spread among the others."""
    centre, spread = others.mean(dim=0), others.std(dim=0)
    # A channel that barely varies among the others must not dominate.
    spread = spread.clamp(min=0.1 * float(spread.square().mean().sqrt()) + 1e-6)
    return sliced_wasserstein((ours - centre) / spread, (others - centre) / spread, rng)


def pixel_distance(ours: list[Tensor], others: list[Tensor], rng: torch.Generator) -> float:
    """Sliced Wasserstein distance of neighbourhoods, averaged over levels; each channel scaled by its spread."""
    distances = []
    for own, other in zip(ours, others, strict=True):
        a, b = (part.view(len(part), 3, -1) for part in (own, other))
        centre, spread = b.mean(dim=(0, 2), keepdim=True), b.std(dim=(0, 2), keepdim=True).clamp(min=1e-6)
        a, b = (((part - centre) / spread).flatten(1) for part in (a, b))
        distances.append(sliced_wasserstein(a, b, rng))
    return sum(distances) / len(distances)


def blurred(pictures: Tensor) -> Tensor:
    """Pictures with a barely visible blur, a Gaussian of 0.6 px, as a scale for the distances."""
    places = torch.arange(-3, 4)
    line = torch.exp(-places.square() / (2 * _BLUR**2))
    line = line / line.sum()
    x = pictures.float().flatten(0, 1)[:, None]
    for kernel, sides in ((line[None, None, None, :], (1, 1, 0, 0)), (line[None, None, :, None], (0, 0, 1, 1))):
        padded = F.pad(x, [side * (len(line) // 2) for side in sides], mode="replicate")
        x = F.conv2d(padded, kernel)
    return x.view(pictures.shape).round().clamp(0, 255).to(torch.uint8)
