"""Appearance of drawings at every size, compared with the true pictures of the same prompts and styles.

Each figure is computed for one style; the figure of the whole set is the mean over drawings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade.evaluation import look
from cascade.evaluation.art_data import Shelf, shelf
from cascade.evaluation.report import Direction, Figure
from cascade.evaluation.tower import STYLES, Tower, at_resolution
from cascade.pictures.images import to_float
from cascade.seeds import generator

PATCHES = (32, 64)
FURTHER_SIZE = 256
"""Largest size at which drawings in styles unknown to the tower are compared."""
FEWEST = 2
"""A style with fewer drawings is left out."""
_PATCHES_EACH = 8
_NEIGHBOURHOODS_EACH = 64
_OTHERS = {64: 96, 256: 64, 1024: 24}
"""Most true pictures per style, by size, whose patches are compared; pictures without a prompt."""
_NEAREST = 5

_NEAR = 0.15
"""Relative difference of a style's figure from that of its true pictures up to which it counts as near."""


@dataclass(frozen=True)
class Asked:
    """A drawing's prompt, style and the id of the true picture that the prompt describes."""

    prompt: str
    style: str
    id: str


@dataclass(frozen=True)
class View:
    """Drawings of one style and size, the true pictures of their prompts, and other true pictures; all uint8.

    drawn, true: (N, 3, S, S).  others: (M, 3, S, S).  twins: the same subjects in another style, where such pictures
    exist: (K, 3, S, S), and the indices of their counterparts in `true`.
    """

    style: str
    drawn: Tensor
    true: Tensor
    others: Tensor
    twins: tuple[Tensor, Sequence[int]]


@dataclass(frozen=True)
class Seen:
    """One figure of one style.

    reference: of the true pictures, NaN if undefined.  blurred: of lightly blurred true pictures, for figures that use
    it as a scale.
    """

    name: str
    value: float
    reference: float
    unit: str
    better: Direction
    count: int
    blurred: float | None = None


def further(data: Path, each: int, seed: int) -> list[Asked]:
    """Prompts for styles unknown to the tower, `each` of every style in an order given by the seed."""
    at_hand = shelf(data, FURTHER_SIZE)
    asked = []
    for style in sorted({entry.style for entry in at_hand.entries.values()} - set(STYLES)):
        names = at_hand.of(style)
        order = torch.randperm(len(names), generator=generator(seed, "look", "further", style)).tolist()
        chosen = [at_hand.entries[names[index]] for index in order[:each]]
        asked += [Asked(entry.prompt, style, entry.id) for entry in chosen]
    return asked


def figures(
    asked: Sequence[Asked], drawn: Tensor, data: Path, tower: Tower, seed: int, label: str = ""
) -> list[Figure]:
    """All figures of drawings (N, 3, S, S) of one size; none if the data have too few true pictures of that size."""
    size = drawn.shape[-1]
    at_hand = shelf(data, size)
    rows: dict[str, list[Seen]] = {}
    for style in sorted({one.style for one in asked}, key=_order):
        view = _view(style, asked, drawn, at_hand, seed)
        if view is not None:
            rows[style] = measure(view, tower, seed)
    return summary(rows, f"at {size} px", label)


def _order(style: str) -> tuple[int, str]:
    return (STYLES.index(style) if style in STYLES else len(STYLES), style)


def _view(style: str, asked: Sequence[Asked], drawn: Tensor, at_hand: Shelf, seed: int) -> View | None:
    """The drawings of a style with its true pictures; None if there are too few."""
    chosen = [index for index, one in enumerate(asked) if one.style == style and one.id in at_hand.entries]
    taken = {one.id for one in asked}
    rest = [name for name in at_hand.of(style) if name not in taken]
    order = torch.randperm(len(rest), generator=generator(seed, "look", style)).tolist()
    others = [rest[index] for index in order[: _OTHERS.get(at_hand.size, min(_OTHERS.values()))]]
    if min(len(chosen), len(others)) < FEWEST:
        return None
    true = at_hand.pictures([asked[index].id for index in chosen])
    twins = [(index, twin) for index, place in enumerate(chosen) if (twin := _twin(asked[place], at_hand))]
    twin_pictures = at_hand.pictures([twin for _, twin in twins])
    return View(style, drawn[chosen], true, at_hand.pictures(others), (twin_pictures, [index for index, _ in twins]))


def _twin(one: Asked, at_hand: Shelf) -> str | None:
    """The id of the same subject's picture in the next available one of the judge's styles."""
    key, place = one.id.removeprefix(f"{one.style}-"), _order(one.style)[0]
    others = [*STYLES[place + 1 :], *STYLES[:place]]
    return next((name for style in others if (name := f"{style}-{key}") in at_hand.entries), None)


# --- of one style ----------------------------------------------------------------------------------------


def measure(view: View, tower: Tower, seed: int) -> list[Seen]:
    """Every figure of the drawings of a style."""
    blurred = look.blurred(view.true)
    found = _distances(view, blurred, tower, seed)
    for name, unit, better, of in _PLAIN:
        ours, true, soft = (of(part) for part in (view.drawn, view.true, blurred))
        if math.isfinite(ours + true + soft):  # pictures without edges have no width
            found.append(Seen(name, ours, true, unit, better, len(view.drawn), soft))
    if view.style in STYLES:
        ours, true = (
            sum(style == view.style for style in tower.read_styles(small(part))) / len(part)
            for part in (view.drawn, view.true)
        )
        found.append(Seen("style obeyed", ours, true, "share", "higher", len(view.drawn)))
    ours, twins = _found(view.drawn, range(len(view.drawn)), view, tower), _found(*view.twins, view, tower)
    found.append(Seen(f"true picture among {_NEAREST}", ours, twins, "share", "higher", len(view.drawn)))
    return found


def _mean(values: Tensor) -> float:
    """The mean over pictures that have a value: one without edges has NaN."""
    return float(values.nanmean())


def _colours(pictures: Tensor) -> float:
    """The geometric mean of the numbers of colours, in which a picture of 2 colours and one of 200 weigh the same."""
    return float(look.colours(pictures).log().mean().exp())


_PLAIN: tuple[tuple[str, str, Direction, Callable[[Tensor], float]], ...] = (
    ("flat pixels", "share", "as true", lambda pictures: _mean(look.flatness(pictures))),
    ("edge width", "px", "as true", lambda pictures: _mean(look.edge_width(pictures))),
    ("colours", "", "as true", _colours),
)


def _distances(view: View, blurred: Tensor, tower: Tower, seed: int) -> list[Seen]:
    """Distances of patches to those of other true pictures; the floor is the distance of the prompts' true pictures."""
    sets = (view.drawn, view.true, blurred)
    size = view.drawn.shape[-1]
    found = []
    for patch in (patch for patch in PATCHES if patch <= size):

        def features(pictures: Tensor, patch: int = patch) -> Tensor:
            chosen = look.patches(pictures, patch, _PATCHES_EACH, generator(seed, "look", "patches", patch))
            return look.patch_features(chosen, tower)

        others = features(view.others)
        parts = [features(part) for part in sets]
        if min(map(len, (others, *parts))) < FEWEST:
            continue
        ours, floor, soft = (
            look.feature_distance(part, others, generator(seed, "look", "directions")) for part in parts
        )
        found.append(Seen(f"patch distance, {patch} px", ours, floor, "spread", "lower", len(view.drawn), soft))
    others_levels = _neighbourhoods(view.others, seed)
    ours, floor, soft = (
        look.pixel_distance(_neighbourhoods(part, seed), others_levels, generator(seed, "look", "directions"))
        for part in sets
    )
    found.append(Seen("patch distance, pixels", ours, floor, "spread", "lower", len(view.drawn), soft))
    return found


def _neighbourhoods(pictures: Tensor, seed: int) -> list[Tensor]:
    return look.neighbourhoods(pictures, _NEIGHBOURHOODS_EACH, generator(seed, "look", "neighbourhoods"))


def _found(pictures: Tensor, own: Sequence[int], view: View, tower: Tower) -> float:
    """Rate at which a picture's own true one is among the nearest of the style, in the tower's shared space.

    own: index of each picture's true one.  NaN if there are no pictures.
    """
    if not own:
        return math.nan
    gallery = torch.cat([view.true, view.others])
    ours, theirs = (tower.place_features(tower.features(small(part))) for part in (pictures, gallery))
    scores = ours @ theirs.T
    own_scores = scores.gather(1, torch.tensor(own)[:, None])
    return float(((scores > own_scores).sum(dim=1) < _NEAREST).double().mean())


def small(pictures: Tensor) -> Tensor:
    """uint8 of any size -> float (N, 3, 64, 64) or smaller, one picture at a time to limit memory."""
    return torch.cat([at_resolution(to_float(picture)[None]) for picture in pictures])


# --- of all styles ---------------------------------------------------------------------------------------


def summary(rows: Mapping[str, Sequence[Seen]], where: str, label: str = "") -> list[Figure]:
    """The mean over drawings of each figure, the same for blurred true pictures, then every style's figures."""
    names = list(dict.fromkeys(seen.name for found in rows.values() for seen in found))
    by_name = {name: [seen for found in rows.values() for seen in found if seen.name == name] for name in names}
    result = []
    for name, found in by_name.items():
        result += _together(f"{name} {where}{label}", found)
    if len(rows) > 1:
        for style, own in rows.items():
            for seen in own:
                title = f"{seen.name} {where}: {style}"
                result.append(_figure(title, seen.value, seen.reference, seen, seen.count))
    return result


def _together(title: str, found: Sequence[Seen]) -> list[Figure]:
    """A figure over all styles, weighted by their drawings; an "as true" figure also as a ratio."""
    count, first = sum(seen.count for seen in found), found[0]

    def mean(values: Sequence[float]) -> float:
        return sum(value * seen.count for value, seen in zip(values, found, strict=True)) / count

    reference = mean([seen.reference for seen in found])
    result = [_figure(title, mean([seen.value for seen in found]), reference, first, count)]
    if first.better == "as true":
        ratios = [seen.value / max(seen.reference, 1e-9) for seen in found]
        result.append(Figure(f"{title}, of the true pictures'", mean(ratios), "", "as true", count, 1.0))
        near = sum(abs(ratio - 1) <= _NEAR for ratio in ratios) / len(ratios)
        result.append(Figure(f"{title}, styles within {_NEAR:.0%}", near, "share", "higher", len(ratios), 1.0))
    soft = [seen.blurred for seen in found if seen.blurred is not None]
    if len(soft) == len(found):
        result.append(_figure(f"{title}, true pictures blurred", mean(soft), reference, first, count))
    return result


def _figure(title: str, value: float, reference: float, seen: Seen, count: int) -> Figure:
    return Figure(title, value, seen.unit, seen.better, count, reference if math.isfinite(reference) else None)
