"""Drawn scenes: the caption describes the picture."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from cascade.data.scenes import (
    ALL_PAIRS,
    COLOURS,
    HELD_OUT_PAIRS,
    NUMBER_WORDS,
    SHAPES,
    STYLE_WORDS,
    WHITE,
    Scene,
    SceneObject,
    describe,
    draw,
    random_scene,
)

SEEDS = range(1200)


def scenes(held_out: bool = False) -> list[Scene]:
    return [random_scene(random.Random(seed), held_out) for seed in SEEDS]


def pixels_of(scene: Scene, colour: str, resolution: int = 64) -> np.ndarray:
    """(N, 2): x and y in [0, 1] of the pixels that have exactly this colour."""
    picture = np.asarray(draw(scene, resolution))
    rows, columns = np.nonzero((picture == COLOURS[colour]).all(axis=-1))
    return (np.stack([columns, rows], axis=1) + 0.5) / resolution


def test_a_scene_depends_on_its_generator_alone() -> None:
    assert scenes() == scenes()
    assert len(set(scenes())) == len(SEEDS)


def test_held_out_pairs_are_drawn_only_when_asked_for() -> None:
    drawn = {(item.colour, item.shape) for scene in scenes() for item in scene.objects}
    held_out = {(item.colour, item.shape) for scene in scenes(held_out=True) for item in scene.objects}
    assert drawn == set(ALL_PAIRS) - HELD_OUT_PAIRS
    assert held_out == HELD_OUT_PAIRS


def test_every_colour_and_every_shape_is_held_out_once() -> None:
    assert len(HELD_OUT_PAIRS) == len(ALL_PAIRS) // 10
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)


def test_colours_lie_far_apart() -> None:
    palette = np.array([WHITE, *COLOURS.values()], dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert distances[~np.eye(len(palette), dtype=bool)].min() > 60


def test_objects_stay_inside_and_their_boxes_do_not_meet() -> None:
    for scene in scenes():
        for index, item in enumerate(scene.objects):
            assert item.radius <= item.x <= 1 - item.radius
            assert item.radius <= item.y <= 1 - item.radius
            for other in scene.objects[:index]:
                distance = max(abs(item.x - other.x), abs(item.y - other.y))
                assert distance > item.radius + other.radius


def test_objects_differ_in_colour_from_the_background() -> None:
    assert all(scene.background != item.colour for scene in scenes() for item in scene.objects)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_fills_its_box_and_nothing_else(shape: str) -> None:
    item = SceneObject(shape, "blue", "large", 0.5, 0.4, 0.3)
    points = pixels_of(Scene((item,)), "blue", resolution=256)
    offsets = (points - [item.x, item.y]) / item.radius
    assert np.abs(offsets).max() <= 1.0
    # Every shape nearly reaches each side (but for the crescent's horns) and covers a fair part of the box.
    assert (np.abs([*offsets.min(axis=0), *offsets.max(axis=0)]) > (0.45 if shape == "crescent" else 0.7)).all()
    assert 0.25 < len(points) / (0.6 * 256) ** 2 < 0.8


def test_shapes_are_told_apart_by_their_pixels() -> None:
    pictures = [
        np.asarray(draw(Scene((SceneObject(shape, "black", "large", 0.5, 0.5, 0.34),)), 64), dtype=float)
        for shape in SHAPES
    ]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert np.abs(picture - other).mean() > 5


def test_the_composition_is_the_same_at_every_resolution() -> None:
    for scene in scenes()[:8]:
        small = np.asarray(draw(scene, 64), dtype=float)
        large = np.asarray(draw(scene, 1024).reduce(16), dtype=float)
        # Only the antialiased edges differ, by the number of samples in a pixel.
        assert np.abs(small - large).mean() < 2


def test_every_caption_has_the_style_words_and_every_coloured_background_is_said() -> None:
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        caption = describe(scene, random.Random(seed))
        assert STYLE_WORDS in caption
        if scene.background != "white":
            assert re.search(rf"on an? {scene.background} background", caption)
        assert ("background" in caption) <= (f"{scene.background} background" in caption)
        for item in scene.objects:
            assert item.colour in caption
            assert item.shape in caption


def test_one_scene_has_many_captions() -> None:
    related = next(scene for scene in scenes() if scene.relation)
    assert len({describe(related, random.Random(seed)) for seed in SEEDS}) > 20


RELATED = re.compile(
    r"an? (?:\w+ )?(?P<one>\w+) \w+ (?:to the )?(?P<relation>left of|right of|above|below) "
    rf"an? (?:\w+ )?(?P<other>\w+) (?:{'|'.join(SHAPES)})"
)


def test_a_said_relation_holds_between_the_colours_in_the_picture() -> None:
    checked: Counter[str] = Counter()
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        match = RELATED.search(describe(scene, random.Random(seed)))
        if match is None or match["one"] == match["other"]:
            continue
        first, second = (pixels_of(scene, match[name]).mean(axis=0) for name in ("one", "other"))
        axis = 0 if match["relation"] in ("left of", "right of") else 1
        before = match["relation"] in ("left of", "above")
        assert (first[axis] < second[axis]) == before
        # The relation that is said is also the plainer one.
        assert abs(first - second)[axis] > 2 * abs(first - second)[1 - axis]
        checked[match["relation"]] += 1
    assert min(checked[relation] for relation in ("left of", "right of", "above", "below")) >= 10


LISTED = re.compile(rf"an? (?:\w+ )?(?P<one>\w+) \w+ and an? (?:\w+ )?(?P<other>\w+) (?:{'|'.join(SHAPES)})")


def test_two_shapes_joined_by_and_stand_side_by_side_in_reading_order() -> None:
    checked = 0
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        match = LISTED.search(describe(scene, random.Random(seed)))
        if match is None or match["one"] == match["other"]:
            continue
        (left, one_height), (right, other_height) = (
            pixels_of(scene, match[name]).mean(axis=0) for name in ("one", "other")
        )
        assert right - left > 2 * abs(one_height - other_height)
        checked += 1
    assert checked >= 50


def components(mask: np.ndarray) -> int:
    """Number of connected regions, by flooding."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask), strict=True)}
    count = 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            row, column = front.pop()
            for neighbour in itertools.product(range(row - 1, row + 2), range(column - 1, column + 2)):
                if neighbour in left:
                    left.remove(neighbour)
                    front.append(neighbour)
    return count


def test_a_said_count_is_the_number_of_regions_in_the_picture() -> None:
    words = {word: number for number, word in NUMBER_WORDS.items()}
    checked: Counter[int] = Counter()
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        match = re.search(rf"\b({'|'.join(words)})\b", describe(scene, random.Random(seed)))
        if match is None:
            continue
        item = scene.objects[0]
        picture = np.asarray(draw(scene, 128), dtype=float)
        ground = WHITE if scene.background == "white" else COLOURS[scene.background]
        to_colour, to_ground = (np.linalg.norm(picture - colour, axis=-1) for colour in (COLOURS[item.colour], ground))
        assert components(to_colour < to_ground) == words[match[1]]
        checked[words[match[1]]] += 1
    assert min(checked[number] for number in (1, 2, 3, 4)) >= 5


def test_a_said_place_is_where_the_colour_is() -> None:
    checked = 0
    for seed, scene in zip(SEEDS, scenes(), strict=True):
        match = re.search(
            r"(in the center|(?:on|at|in) the (?:left|right|top|bottom)[a-z ]*)",
            describe(scene, random.Random(seed)),
        )
        if match is None or scene.relation is not None:
            continue
        item = scene.objects[0]
        x, y = item.x, item.y
        said = match[1]
        assert ("left" in said) == (x < 0.4)
        assert ("right" in said) == (x > 0.6)
        assert ("top" in said) == (y < 0.4)
        assert ("bottom" in said) == (y > 0.6)
        checked += 1
    assert checked > 20
