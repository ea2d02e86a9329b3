"""The suite of drawn scenes: prompts whose every word can be checked, with separate figures for held-out pairs.

After GenEval (Ghosh et al. 2023, arXiv:2310.11513): one object, two objects with their colours, counts, relations,
and also places, sizes and backgrounds. `scene_reader` replaces GenEval's detector.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cascade.data.scenes import (
    EMOJI_PAIRS,
    HELD_OUT_PAIRS,
    NUMBER_WORDS,
    OPPOSITE,
    PLACES,
    SIZES,
    STYLE_WORDS,
    Scene,
    SceneObject,
    article,
    draw,
    plural,
    random_scene,
)
from cascade.evaluation import report
from cascade.evaluation.report import Figure, Report, Request, share
from cascade.evaluation.scene_reader import Found, Reading, read_scene, relation
from cascade.pipeline import CascadePipeline
from cascade.seeds import derive_seed

Kind = Literal["single object", "two objects", "count", "relation", "place", "size", "background"]

KINDS: dict[Kind, int] = {
    "single object": 80,
    "two objects": 80,
    "count": 64,
    "relation": 64,
    "place": 45,
    "size": 45,
    "background": 40,
}
"""Number of prompts of each kind."""

HELD_OUT_EVERY = 4
"""Among single and two objects, every fourth prompt uses pairs that training never drew."""

UNSEEN_PAIRS = HELD_OUT_PAIRS - EMOJI_PAIRS
"""The pairs of these prompts."""

_SHOWN = 48  # pictures on the contact sheet


@dataclass(frozen=True)
class Item:
    """A prompt and a scene that it describes."""

    kind: Kind
    scene: Scene
    prompt: str
    held_out: bool = False


# --- what is asked ---------------------------------------------------------------------------------------


def items(seed: int) -> list[Item]:
    """All prompts of a seed, with the kinds evenly mixed, so that the first n are a representative smaller suite."""
    mixed = [((index + 0.5) / count, kind, index) for kind, count in KINDS.items() for index in range(count)]
    return [_item(kind, index, seed) for _, kind, index in sorted(mixed)]


def _item(kind: Kind, index: int, seed: int) -> Item:
    """The first random scene of this kind; `index` selects the count, relation, place or size in turn."""
    held_out = kind in ("single object", "two objects") and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    rng = random.Random(derive_seed(seed, "scene suite", kind, index))
    while True:
        scene = random_scene(rng, held_out)
        seen_as_emoji = any((item.colour, item.shape) in EMOJI_PAIRS for item in scene.objects)
        if _FITS[kind](scene, index) and (scene.background != "white") == (kind == "background") and not seen_as_emoji:
            return Item(kind, scene, f"{_words(kind, scene)}, {STYLE_WORDS}", held_out)


def _is_single(scene: Scene) -> bool:
    return scene.place is not None


_FITS: dict[Kind, Callable[[Scene, int], bool]] = {
    "single object": lambda scene, _: _is_single(scene),
    "two objects": lambda scene, _: _two_pairs(scene),
    "count": lambda scene, index: (
        scene.place is None and scene.relation is None and len(scene.objects) == index % len(NUMBER_WORDS) + 1
    ),
    "relation": lambda scene, index: _two_pairs(scene) and scene.relation == tuple(OPPOSITE)[index % len(OPPOSITE)],
    "place": lambda scene, index: scene.place == tuple(PLACES)[index % len(PLACES)],
    "size": lambda scene, index: _is_single(scene) and scene.objects[0].size == tuple(SIZES)[index % len(SIZES)],
    "background": lambda scene, _: _is_single(scene),
}


def _two_pairs(scene: Scene) -> bool:
    """Whether two related objects differ in shape and colour; otherwise a swap would not be noticed."""
    if scene.relation is None:
        return False
    first, second = scene.objects
    return first.shape != second.shape and first.colour != second.colour


def _words(kind: Kind, scene: Scene) -> str:
    first = scene.objects[0]
    pair = f"{first.colour} {first.shape}"
    if kind in ("two objects", "relation"):
        second = scene.objects[1]
        joint = "and" if kind == "two objects" else scene.relation
        return f"{article(pair)} {joint} {article(f'{second.colour} {second.shape}')}"
    count = len(scene.objects)
    words: dict[str, str] = {
        "count": f"{NUMBER_WORDS[count]} {pair if count == 1 else f'{first.colour} {plural(first.shape)}'}",
        "place": f"{article(pair)} {scene.place}",
        "size": article(f"{first.size} {pair}"),
        "background": f"{article(pair)} on {article(scene.background)} background",
    }
    return words.get(kind, article(pair))


# --- what is right ---------------------------------------------------------------------------------------


def judge(item: Item, reading: Reading) -> dict[str, bool]:
    """Whether each attribute named in the prompt is right in a picture, and under `all` whether all are."""
    wanted, found = item.scene.objects, reading.objects
    right = {
        "shape": {one.shape for one in wanted} == {one.shape for one in found},
        "colour": {one.colour for one in wanted} == {one.colour for one in found},
    }
    if item.kind == "two objects":
        right["binding"] = _pairs(wanted) == _pairs(found)
    if item.kind == "count":
        right["count"] = len(wanted) == len(found)
    if item.kind == "relation":
        right["relation"] = _pairs(wanted) == _pairs(found) and _stand_right(item.scene, found)
    if item.kind == "place":
        right["place"] = any(one.place == item.scene.place for one in found)
    if item.kind == "size":
        right["size"] = any(one.size(1) == wanted[0].size for one in found)
    if item.kind == "background":
        right["background"] = reading.background == item.scene.background
    return {**right, "all": all(right.values()) and _pairs(wanted) == _pairs(found)}


def _pairs(objects: Sequence[SceneObject] | Sequence[Found]) -> Counter[tuple[str, str]]:
    return Counter((item.colour, item.shape) for item in objects)


def _stand_right(scene: Scene, found: Sequence[Found]) -> bool:
    """Whether the two right objects have the scene's relation."""
    first = next(one for one in found if one.shape == scene.objects[0].shape)
    second = next(one for one in found if one is not first)
    return relation(first, second) == scene.relation


# --- the suite -------------------------------------------------------------------------------------------


def run(pipeline: CascadePipeline, request: Request) -> Report:
    """Draw every prompt with the base stage, read the pictures, and count what is right."""
    asked = items(request.seed)[: request.limit]
    pictures = report.draw(pipeline, [item.prompt for item in asked], request)
    readings = [read_scene(picture) for picture in pictures]
    resolution = report.base_resolution(pipeline)
    truths = [read_scene(draw(item.scene, resolution)) for item in asked]
    outcomes = [judge(item, reading) for item, reading in zip(asked, readings, strict=True)]
    ceiling = [judge(item, reading) for item, reading in zip(asked, truths, strict=True)]
    sheet = [
        (picture, f"{'+' if outcome['all'] else '-'} {item.prompt.removesuffix(f', {STYLE_WORDS}')}")
        for picture, item, outcome in zip(pictures, asked, outcomes, strict=True)
    ]
    return Report(
        "scenes",
        figures(asked, outcomes, ceiling),
        sheet[:_SHOWN],
        settings={"prompts": len(asked), "resolution": resolution},
        notes=[
            f"{shuffled(asked, readings):.3f} of the same pictures are right for another prompt of their kind: chance.",
            f"Held-out pairs, in no training picture: {', '.join(f'{c} {s}' for c, s in sorted(UNSEEN_PAIRS))}.",
        ],
    )


def figures(
    asked: Sequence[Item], outcomes: Sequence[dict[str, bool]], ceiling: Sequence[dict[str, bool]]
) -> list[Figure]:
    """All-correct over all prompts and by kind, held-out pairs apart; each attribute over prompts that name it."""
    seen = [index for index, item in enumerate(asked) if not item.held_out]
    unseen = [index for index, item in enumerate(asked) if item.held_out]

    def measured(name: str, attribute: str, of: Sequence[int]) -> list[Figure]:
        chosen = [index for index in of if attribute in outcomes[index]]
        true = [ceiling[index][attribute] for index in chosen]
        return share(name, [outcomes[index][attribute] for index in chosen], sum(true) / max(1, len(true)))

    result = measured("all correct", "all", seen) + measured("all correct, held-out pairs", "all", unseen)
    for kind in KINDS:
        result += measured(kind, "all", [index for index in seen if asked[index].kind == kind])
        held_out = [index for index in unseen if asked[index].kind == kind]
        result += measured(f"{kind}, held-out pairs", "all", held_out)
    for attribute in ("shape", "colour", "binding", "count", "relation", "place", "size", "background"):
        result += measured(f"attribute: {attribute}", attribute, seen)
    for number, word in NUMBER_WORDS.items():
        counted = [index for index in seen if len(asked[index].scene.objects) == number]
        result += measured(f"attribute: count of {word}", "count", counted)
    return result


def shuffled(asked: Sequence[Item], readings: Sequence[Reading]) -> float:
    """The all-correct share by chance: every picture is compared with the next prompt of its kind."""
    right = []
    for kind in KINDS:
        own = [index for index, item in enumerate(asked) if item.kind == kind]
        right += [
            judge(asked[after], readings[before])["all"]
            for before, after in zip(own, own[1:] + own[:1], strict=True)
            if asked[before].prompt != asked[after].prompt
        ]
    return sum(right) / max(1, len(right))
