"""The scene suite judges true drawings right, also blurred and JPEG-ed, and shuffled prompts wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from cascade.data.scenes import COLOURS, EMOJI_PAIRS, HELD_OUT_PAIRS, PLACES, SHAPES, Scene, SceneObject, draw
from cascade.drawing.output import CascadeOutput
from cascade.evaluation.report import Request
from cascade.evaluation.scene_reader import read_scene, relation
from cascade.evaluation.scenes import HELD_OUT_EVERY, KINDS, UNSEEN_PAIRS, Item, figures, items, judge, run, shuffled


def as_jpeg(picture: Image.Image) -> Image.Image:
    """At a phone's quality, with colours at half resolution."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return Image.open(buffer)


WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as drawn": lambda picture: picture,
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
    "jpeg": as_jpeg,
}


def share_right(asked: list[Item], resolution: int, way: Callable[[Image.Image], Image.Image]) -> float:
    readings = [read_scene(way(draw(item.scene, resolution))) for item in asked]
    return sum(judge(item, reading)["all"] for item, reading in zip(asked, readings, strict=True)) / len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_true_drawings_are_read_right(way: str):
    """Over 99 % of whole scenes, every attribute that their prompts name."""
    assert share_right(items(seed=0), 64, WAYS[way]) > 0.99


@pytest.mark.slow
def test_true_drawings_of_the_cascade_s_largest_size_are_read_right():
    assert share_right(items(seed=1)[:100], 1024, WAYS["as drawn"]) > 0.99


def test_some_true_drawings_are_read_right_and_shuffled_ones_are_not():
    asked = items(seed=2)[:24]
    readings = [read_scene(draw(item.scene, 64)) for item in asked]
    assert sum(judge(item, reading)["all"] for item, reading in zip(asked, readings, strict=True)) >= 23
    assert shuffled(asked, readings) < 0.05


def test_every_shape_and_colour_is_read():
    for index, shape in enumerate(SHAPES):
        colour = tuple(COLOURS)[index]
        (found,) = read_scene(draw(Scene((SceneObject(shape, colour, "medium", 0.4, 0.55, 0.22),)), 64)).objects
        assert (found.shape, found.colour) == (shape, colour)
        assert (found.x, found.y, found.radius) == pytest.approx((0.4, 0.55, 0.22), abs=0.01)
        assert found.size(1) == "medium"


def test_a_thin_part_between_others_is_read_and_not_lost():
    """Stripes two pixels wide: what is near to a short one is nearer to its neighbours."""
    picture = Image.new("RGB", (64, 64), "white")
    for row in range(64):
        for column in range(64):
            across, along = column - row, column + row
            if across % 3 != 0 and abs(across) < 12 and abs(along - 64) < (8 if across in (1, 2) else 50):
                picture.putpixel((column, row), COLOURS["blue"])
    assert all(found.colour in COLOURS for found in read_scene(picture).objects)


def test_held_out_prompts_ask_for_pairs_that_no_emoji_shows():
    """Read against the names of all emoji in the training data."""
    names = Path("scripts/text_encoder/concept_names.txt")
    emoji = [set(name.split()) for name in (Path(__file__).parents[2] / names).read_text().splitlines()]
    asked = {(one.colour, one.shape) for item in items(seed=0) if item.held_out for one in item.scene.objects}
    assert asked == UNSEEN_PAIRS
    assert not [pair for pair in asked if any(set(pair) <= words for words in emoji)]
    assert all(any(set(pair) <= words for words in emoji) for pair in EMOJI_PAIRS), "the others are emoji"


def test_an_empty_picture_has_no_objects():
    reading = read_scene(Image.new("RGB", (64, 64), COLOURS["green"]))
    assert (reading.background, reading.objects) == ("green", ())


def test_relations_are_read_from_where_objects_stand():
    left, right = (SceneObject(shape, "red", "small", x, 0.5, 0.1) for shape, x in (("star", 0.3), ("ring", 0.7)))
    star, ring = read_scene(draw(Scene((left, right)), 64)).objects
    assert (relation(star, ring), relation(ring, star)) == ("left of", "right of")


def test_every_attribute_can_be_wrong_alone():
    """A picture of something else in one respect is judged wrong in that respect."""
    one = Scene((SceneObject("circle", "red", "medium", 0.25, 0.5, 0.22),), "blue", place="on the left")
    item = Item("background", one, "a red circle on a blue background")

    def judged(item: Item, **changes: object) -> dict[str, bool]:
        background = str(changes.pop("background", "blue"))
        objects = (replace(one.objects[0], **changes),)
        return judge(item, read_scene(draw(Scene(objects, background), 64)))

    assert judged(item) == {"shape": True, "colour": True, "background": True, "all": True}
    assert judged(item, shape="square")["shape"] is False
    assert judged(item, colour="yellow")["colour"] is False
    assert judged(item, background="gray") == {"shape": True, "colour": True, "background": False, "all": False}
    place = replace(item, kind="place")
    assert judged(place)["place"] is True
    assert judged(place, x=0.7)["place"] is False
    assert all(judged(replace(item, kind="place"), x=PLACES["on the left"][0]).values())
    size = replace(item, kind="size")
    assert judged(size)["size"] is True
    assert judged(size, x=0.5, radius=0.34) == {"shape": True, "colour": True, "size": False, "all": False}


def test_colours_on_each_other_s_shape_are_wrong():
    pair = (SceneObject("circle", "red", "small", 0.3, 0.5, 0.15), SceneObject("star", "blue", "small", 0.7, 0.5, 0.15))
    item = Item("two objects", Scene(pair, relation="left of"), "a red circle and a blue star")
    swapped = tuple(replace(one, colour=other.colour) for one, other in zip(pair, pair[::-1], strict=True))
    assert judge(item, read_scene(draw(Scene(pair), 64))) == {
        "shape": True, "colour": True, "binding": True, "all": True,
    }  # fmt: skip
    assert judge(item, read_scene(draw(Scene(swapped), 64))) == {
        "shape": True, "colour": True, "binding": False, "all": False,
    }  # fmt: skip


def test_a_missing_object_is_a_wrong_count():
    three = tuple(SceneObject("star", "blue", "small", x, 0.5, 0.08) for x in (0.2, 0.5, 0.8))
    item = Item("count", Scene(three), "three blue stars")
    assert judge(item, read_scene(draw(Scene(three), 64)))["all"]
    assert judge(item, read_scene(draw(Scene(three[:2]), 64))) == {
        "shape": True, "colour": True, "count": False, "all": False,
    }  # fmt: skip


def test_held_out_prompts_name_held_out_pairs_and_no_other_prompt_does():
    for item in items(seed=0):
        pairs = {(one.colour, one.shape) for one in item.scene.objects}
        assert (pairs <= HELD_OUT_PAIRS) == item.held_out
        assert item.held_out or not pairs & HELD_OUT_PAIRS
        for colour, shape in pairs:
            assert colour in item.prompt
            assert shape in item.prompt


def test_the_suite_begins_with_every_kind():
    asked = items(seed=0)
    assert len(asked) == sum(KINDS.values())
    assert {item.kind for item in asked[:20]} == set(KINDS)
    assert sum(item.held_out for item in asked) == (KINDS["single object"] + KINDS["two objects"]) / HELD_OUT_EVERY
    assert items(seed=1)[0].prompt != asked[0].prompt
    assert items(seed=0) == asked


class Painter:
    """A pipeline that draws truly, whatever it is asked for."""

    def __init__(self, truths: dict[str, Scene]) -> None:
        self.truths = truths
        config = type("Config", (), {"resolution": 64, "name": "base"})
        self.slots = [type("Slot", (), {"config": config})]

    def __call__(self, prompts: list[str], **_options: object) -> CascadeOutput:
        pictures = [draw(self.truths[prompt], 64) for prompt in prompts]
        return CascadeOutput(pictures, {64: pictures}, [0] * len(prompts), prompts)


def test_drawings_that_match_the_prompt_get_every_point():
    asked = items(seed=3)[:20]
    report = run(Painter({item.prompt: item.scene for item in asked}), Request(seed=3, limit=20))  # type: ignore[arg-type]
    assert report.figures[0].name == "all correct"
    assert report.figures[0].value == report.figures[0].reference == 1
    assert {figure.name for figure in report.figures} >= {*KINDS, "single object, held-out pairs"}
    assert len(report.pictures) == 20


def test_figures_count_the_pictures_they_are_taken_over():
    asked = items(seed=0)[:40]
    outcomes = [{"shape": True, "colour": index % 2 == 0, "all": False} for index in range(40)]
    by_name = {figure.name: figure for figure in figures(asked, outcomes, outcomes)}
    seen = [index for index, item in enumerate(asked) if not item.held_out]
    assert by_name["attribute: shape"].value == 1
    assert by_name["attribute: colour"].value == sum(index % 2 == 0 for index in seen) / len(seen)
    assert by_name["all correct"].count + by_name["all correct, held-out pairs"].count == 40
