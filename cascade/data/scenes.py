"""Drawn scenes of coloured shapes: endless, labelled, without files, and with true captions.

A scene is a list of shapes in the unit square. It has the same composition at any resolution, and several descriptions
in words. Each shape stays inside its box, and boxes do not overlap.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Relation = Literal["left of", "right of", "above", "below"]
Size = Literal["small", "medium", "large"]
Point = tuple[float, float]

STYLE_WORDS = "drawn shapes"
"""Part of every caption, like the style words of the art data."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring", "hexagon", "crescent")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 40),
    "orange": (255, 138, 0),
    "yellow": (255, 220, 30),
    "green": (30, 150, 60),
    "blue": (30, 90, 220),
    "purple": (125, 45, 165),
    "pink": (255, 130, 185),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
}
WHITE = (255, 255, 255)

HELD_OUT_PAIRS = frozenset((colour, SHAPES[(3 * index + 1) % len(SHAPES)]) for index, colour in enumerate(COLOURS))
"""(colour, shape) pairs that training never draws: every colour and every shape exactly once. Each occurs in other
pairs, so a correct picture of a held-out pair shows that the network combines colour and shape."""
EMOJI_PAIRS = frozenset({("red", "square"), ("green", "circle"), ("orange", "diamond")})
"""The HELD_OUT_PAIRS that also occur as emoji, and so in the emoji training data."""

ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SIZES: dict[Size, float] = {"small": 0.13, "medium": 0.22, "large": 0.34}
"""Half the width of a single shape's box, as a share of the picture's width."""
CROWDING = {1: 1.0, 2: 0.6, 3: 0.5, 4: 0.45}
"""Factor on the sizes, by the number of shapes."""
ARRANGEMENTS: dict[int, tuple[Point, ...]] = {
    1: ((0.5, 0.5),),
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.5, 0.28), (0.26, 0.72), (0.74, 0.72)),
    4: ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
"""Positions of equal shapes, by their number. They are fixed because captions do not mention them: with random
positions all parts of the picture must agree on a guess, and a small network draws one shape too few or too many."""
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
PLACES: dict[str, Point] = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape: its name, its colour, and its box: centre (x, y) and half width in the unit square."""

    shape: str
    colour: str
    size: Size
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Shapes on a background.

    background: `white` or a name of COLOURS that no shape has.  relation: of the first of two shapes to the
    second.  place: the position of a single shape, a key of PLACES.
    """

    objects: tuple[SceneObject, ...]
    background: str = "white"
    relation: Relation | None = None
    place: str | None = None


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A single shape, two related shapes, or several equal shapes; `held_out`: only HELD_OUT_PAIRS."""
    pairs = [pair for pair in ALL_PAIRS if (pair in HELD_OUT_PAIRS) == held_out]
    kind = rng.choices(("single", "related", "counted"), weights=(3, 4, 3))[0]
    if kind == "single":
        return _single(rng, pairs)
    if kind == "related":
        return _related(rng, pairs)
    return _counted(rng, pairs)


def _single(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    colour, shape = rng.choice(pairs)
    # A large shape fills most of the picture; only smaller ones get other places.
    size: Size = rng.choices(("small", "medium", "large"), weights=(1, 1, 2))[0]
    place = "in the center" if size == "large" or rng.random() < 0.4 else rng.choice(tuple(PLACES))
    x, y = PLACES[place]
    return Scene(
        (SceneObject(shape, colour, size, _near(x, 0.02, rng), _near(y, 0.02, rng), SIZES[size]),),
        background=_background(rng, {colour}),
        place=place,
    )


def _related(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    first, second = rng.sample(pairs, 2)
    relation: Relation = rng.choice(tuple(OPPOSITE))
    sizes: list[Size] = [rng.choice(tuple(SIZES)) for _ in range(2)]
    # The first shape precedes the second along one axis; along the other they differ little.
    along = [_near(0.26, 0.03, rng), _near(0.74, 0.03, rng)]
    across = [_near(0.5, 0.06, rng), _near(0.5, 0.06, rng)]
    if relation in ("right of", "below"):
        along.reverse()
    places = list(zip(along, across, strict=True))
    if relation in ("above", "below"):
        places = [(x, y) for y, x in places]
    objects = tuple(
        SceneObject(shape, colour, size, x, y, SIZES[size] * CROWDING[2])
        for (colour, shape), size, (x, y) in zip((first, second), sizes, places, strict=True)
    )
    return Scene(objects, background=_background(rng, {first[0], second[0]}), relation=relation)


def _counted(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    colour, shape = rng.choice(pairs)
    count = rng.randint(1, 4)
    size: Size = rng.choice(tuple(SIZES))
    radius = SIZES[size] * CROWDING[count]
    objects = tuple(
        SceneObject(shape, colour, size, _near(x, 0.025, rng), _near(y, 0.025, rng), radius)
        for x, y in ARRANGEMENTS[count]
    )
    return Scene(objects, background=_background(rng, {colour}))


def _background(rng: random.Random, worn: set[str]) -> str:
    """White in most cases, else a colour that no shape has."""
    if rng.random() < 0.75:
        return "white"
    return rng.choice([colour for colour in COLOURS if colour not in worn])


def _near(value: float, spread: float, rng: random.Random) -> float:
    return value + rng.uniform(-spread, spread)


# --- in words --------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: random.Random) -> str:
    """One of many true captions of `scene`.

    Shapes, colours, counts above one and a coloured background are always mentioned; sizes, places and a white
    background sometimes. Two shapes next to each other may be joined by `and`, the left one first.
    """
    subject = _subject(scene, rng)
    if scene.background != "white" or rng.random() < 0.15:
        subject += f" on {article(scene.background)} background"
    pattern = rng.choice(("{}, {style}", "{}, {style}", "{style}, {}", "{style}: {}", "a picture of {}, {style}"))
    return pattern.format(subject, style=STYLE_WORDS)


def _subject(scene: Scene, rng: random.Random) -> str:
    if scene.relation is not None:
        return _related_words(scene, scene.relation, rng)
    first = scene.objects[0]
    count = len(scene.objects)
    size = f"{first.size} " if rng.random() < 0.4 else ""
    if count > 1:
        return f"{NUMBER_WORDS[count]} {size}{first.colour} {plural(first.shape)}"
    words = f"{size}{first.colour} {first.shape}"
    if scene.place is None:
        return article(words) if rng.random() < 0.5 else f"{NUMBER_WORDS[1]} {words}"
    return f"{article(words)} {scene.place}" if rng.random() < 0.5 else article(words)


def _related_words(scene: Scene, relation: Relation, rng: random.Random) -> str:
    first, second = scene.objects
    side_by_side = relation in ("left of", "right of")
    listed = side_by_side and rng.random() < 0.5
    # A list goes from left to right; a relation may start with either shape.
    if relation == "right of" if listed else rng.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    sizes_said = rng.random() < 0.4
    one, other = (
        article(f"{item.size} {item.colour} {item.shape}" if sizes_said else f"{item.colour} {item.shape}")
        for item in (first, second)
    )
    if listed:
        return f"{one} and {other}"
    return f"{one} {rng.choice((relation, f'to the {relation}' if side_by_side else relation))} {other}"


def article(words: str) -> str:
    """`a circle`, `an orange circle`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """`circles`, `crosses`."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


# --- in colour -------------------------------------------------------------------------------------------


def draw(scene: Scene, resolution: int) -> Image.Image:
    """RGB picture of `resolution` x `resolution`, antialiased: drawn larger, then area-averaged."""
    factor = min(8, max(2, 2048 // resolution))
    large = resolution * factor
    ground = WHITE if scene.background == "white" else COLOURS[scene.background]
    canvas = Image.new("RGB", (large, large), ground)
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        _draw_object(pen, item, large, ground)
    return canvas.reduce(factor)


def _draw_object(pen: ImageDraw.ImageDraw, item: SceneObject, large: int, ground: tuple[int, int, int]) -> None:
    def on_canvas(points: Sequence[Point]) -> list[Point]:
        return [((item.x + item.radius * x) * large, (item.y + item.radius * y) * large) for x, y in points]

    colour = COLOURS[item.colour]
    if item.shape in _DISCS:
        disc, hole = _DISCS[item.shape]
        pen.ellipse(on_canvas(_corners(*disc)), fill=colour)
        if hole is not None:
            pen.ellipse(on_canvas(_corners(*hole)), fill=ground)
    else:
        pen.polygon(on_canvas(_OUTLINES[item.shape]), fill=colour)


def _corners(x: float, y: float, radius: float) -> list[Point]:
    return [(x - radius, y - radius), (x + radius, y + radius)]


def _polygon(corners: int, radius: float = 1.0, turn: float = 0.0) -> list[Point]:
    """Regular polygon about the origin, the first corner on top (y grows downwards)."""
    angles = [turn + 2 * math.pi * index / corners for index in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    outer, inner = _polygon(5), _polygon(5, radius=0.42, turn=math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[Point]:
    """The curve x = 16 sin^3, y = 13 cos - 5 cos 2 - 2 cos 3 - cos 4, scaled into the box."""
    angles = [2 * math.pi * index / 120 for index in range(120)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 16,
        )
        for t in angles
    ]


def _cross(arm: float = 0.32) -> list[Point]:
    a = arm
    return [
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    ]


# Shapes in their box [-1, 1]^2, as a disc (x, y, radius) with or without a hole, or as an outline.
_DISCS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float] | None]] = {
    "circle": ((0, 0, 0.95), None),
    "ring": ((0, 0, 1), (0, 0, 0.55)),
    # The hole also stays inside the box: it is painted in the background's colour and must not cover a neighbour.
    "crescent": ((-0.1, 0, 0.9), (0.32, 0, 0.68)),
}
_OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.9), (1, 0.8), (-1, 0.8)],
    "star": _star(),
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "heart": _heart(),
    "cross": _cross(),
    "hexagon": _polygon(6),
}
