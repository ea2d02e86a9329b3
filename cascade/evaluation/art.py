"""The art suite: seen and unseen subjects in six styles, judged by a tower trained only on the training pictures.

Every prompt describes an existing picture, so each figure is reported with the same figure of the true pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade.errors import CascadeError
from cascade.evaluation import art_look, report
from cascade.evaluation.art_data import FLAGS, Art, Concept, read_art, shelf
from cascade.evaluation.distances import (
    NEIGHBOURS,
    kernel_distance,
    near_copies,
    precision_and_recall,
    sliced_wasserstein,
)
from cascade.evaluation.published import Published
from cascade.evaluation.report import Figure, Report, Request, judge_sha256, share
from cascade.evaluation.tower import STYLES, Tower, at_resolution, load_tower
from cascade.pictures.images import from_pil, to_float, to_pil
from cascade.pipeline import CascadePipeline
from cascade.seeds import generator

TRAINING_CONCEPTS = 100
STYLES_EACH = 2
"""Number of styles in which every subject is drawn."""
_PAIRS_SHOWN = 24
_MOST = {64: None, 256: 64, 1024: 24}
"""Number of measured drawings of each set by size, None: all. Larger sizes use the last value."""


@dataclass(frozen=True)
class Item:
    """A prompt, and the index of the true picture that it describes in the art of its set."""

    prompt: str
    concept: Concept
    style: str
    true: int


@dataclass(frozen=True)
class Drawn:
    """The pictures for one set of prompts and the true ones, N of each.

    features: (N, 256) of the tower.  pixels: (N, 3, 64, 64) in [-1, 1].  sizes: uint8 (n, 3, S, S) by side, of the
    first n items; of all items for the base stage.
    """

    items: Sequence[Item]
    pictures: Sequence[Image.Image]
    pixels: Tensor
    features: Tensor
    true_pixels: Tensor
    true_features: Tensor
    sizes: Mapping[int, Tensor]

    def asked(self, size: int) -> list[art_look.Asked]:
        """Prompts, styles and true pictures of the drawings of a size."""
        items = self.items[: len(self.sizes[size])]
        return [art_look.Asked(item.prompt, item.style, f"{item.style}-{item.concept.key}") for item in items]


def run(pipeline: CascadePipeline, request: Request) -> Report:
    """Draw subjects of both kinds and measure them. Raises CascadeError without `--data`."""
    if request.data is None:
        raise CascadeError("--suite art: needs true pictures; make them with scripts/prepare_data.py and set --data")
    training, held_out, known = _true_pictures(request.data)
    tower, published = load_tower(), Published.load(request)
    unseen, seen = choose(training, held_out, request.seed, request.limit)
    sets = {
        name: _draw(pipeline, request, tower, items, art)
        for name, items, art in (("unseen", unseen, held_out), ("training", seen, training))
        if items
    }
    figures: list[Figure] = []
    for name, drawn in sets.items():
        figures += retrieval(name, drawn, tower, _candidates(name, training, held_out, request.seed))
    if "unseen" in sets:
        others, asked = _others(held_out, unseen), sets["unseen"]
        figures += likeness(asked, others, tower, request.seed)
        figures += published.distances(asked.pixels, asked.true_pixels, others)
    for name, drawn in sets.items():
        figures += copies(name, drawn, training, known)
    figures += styles(list(sets.values()), tower)
    figures += look(sets, tower, request, lambda name: _candidates(name, training, held_out, request.seed))
    figures += further(pipeline, request, tower)
    for name, drawn in sets.items():
        prompts = [item.prompt for item in drawn.items]
        figures += published.figures(name, drawn.pictures, to_pil(drawn.true_pixels), prompts)
    return Report(
        "art",
        figures,
        _sheet(list(sets.values())),
        settings={
            "prompts": len(unseen) + len(seen),
            "data_sha256": [training.digest, held_out.digest],
            "judges_sha256": {"tower": judge_sha256(tower), **published.sha256()},
        },
        notes=[
            "Unseen: subjects of the validation and test splits, flags left out. True pictures: the same prompts'.",
            *unmeasured(pipeline, request),
        ],
    )


@lru_cache(maxsize=1)
def _true_pictures(data: Path) -> tuple[Art, Art, Tensor]:
    """Training pictures, held-out pictures, and the tower's features of the former; cached for a sweep of settings."""
    training = read_art(data, "train")
    return training, read_art(data, "validation", "test"), load_tower().features(to_float(training.pixels))


# --- what is asked ---------------------------------------------------------------------------------------


def choose(training: Art, held_out: Art, seed: int, limit: int | None) -> tuple[list[Item], list[Item]]:
    """Prompts for every unseen subject but flags, and for some training subjects; at most `limit`, half of each."""
    unseen = _items(held_out, _candidates("unseen", training, held_out, seed))
    seen = _items(training, _candidates("training", training, held_out, seed))
    if limit is None:
        return unseen, seen
    return unseen[: (limit + 1) // 2], seen[: limit // 2]


def _candidates(name: str, training: Art, held_out: Art, seed: int) -> list[Concept]:
    """The subjects of a set, in an order given by the seed, to whose words a picture is compared."""
    art, most = (held_out, None) if name == "unseen" else (training, TRAINING_CONCEPTS)
    subjects = [concept for concept in art.distinct() if concept.group != FLAGS]
    order = torch.randperm(len(subjects), generator=generator(seed, "art suite", name)).tolist()
    return [subjects[index] for index in order][:most]


def _items(art: Art, concepts: Sequence[Concept]) -> list[Item]:
    """Every subject once in one style, then again in another, with alternating styles."""
    pictures = {
        (concept.key, style): index for index, (concept, style) in enumerate(zip(art.concepts, art.styles, strict=True))
    }
    result = []
    for turn in range(STYLES_EACH):
        for index, concept in enumerate(concepts):
            drawn_in = [style for style in STYLES if (concept.key, style) in pictures]
            style = drawn_in[(index + turn * max(1, len(drawn_in) // STYLES_EACH)) % len(drawn_in)]
            prompt = f"{concept.name}, {style.replace('_', ' ')} style"
            result.append(Item(prompt, concept, style, pictures[concept.key, style]))
    return result


def _draw(pipeline: CascadePipeline, request: Request, tower: Tower, items: Sequence[Item], art: Art) -> Drawn:
    counts = {size: _most(size) or len(items) for size in measured_sizes(pipeline, request)}
    counts[report.base_resolution(pipeline)] = len(items)
    drawn = report.draw_stages(pipeline, [item.prompt for item in items], request, counts)
    pictures = drawn[min(drawn)]
    sizes = {size: torch.stack([from_pil(picture) for picture in own]) for size, own in drawn.items()}
    pixels = at_resolution(to_float(sizes[min(sizes)]))
    true_pixels = to_float(art.pixels[[item.true for item in items]])
    return Drawn(items, pictures, pixels, tower.features(pixels), true_pixels, tower.features(true_pixels), sizes)


def measured_sizes(pipeline: CascadePipeline, request: Request) -> list[int]:
    """The sizes of the stages at which true pictures exist, up to `until`."""
    sizes = [slot.config.resolution for slot in pipeline.slots]
    if request.until is not None and request.until not in sizes:
        raise CascadeError(
            f"--until {request.until}: no stage draws that size; choose from {', '.join(map(str, sizes))}"
        )
    assert request.data is not None
    return [size for size in sizes if size <= (request.until or size) and shelf(request.data, size).entries]


def unmeasured(pipeline: CascadePipeline, request: Request) -> list[str]:
    """A note for sizes that were not measured for lack of true pictures, although no `until` excluded them."""
    sizes = [slot.config.resolution for slot in pipeline.slots if slot.config.resolution <= (request.until or 1 << 20)]
    missing = sorted(set(sizes) - set(measured_sizes(pipeline, request)))
    return [f"No true pictures of {size} px in the data: drawings of that size were not measured." for size in missing]


def _most(size: int) -> int | None:
    return next((most for limit, most in _MOST.items() if size <= limit), min(filter(None, _MOST.values())))


def _others(art: Art, items: Sequence[Item]) -> Tensor:
    """(N, 3, 64, 64): the held-out pictures without a prompt, flags left out."""
    asked = {item.true for item in items}
    rest = [index for index in range(len(art.concepts)) if index not in asked and art.concepts[index].group != FLAGS]
    return to_float(art.pixels[rest])


# --- what is measured ------------------------------------------------------------------------------------


def look(
    sets: Mapping[str, Drawn], tower: Tower, request: Request, candidates: Callable[[str], Sequence[Concept]]
) -> list[Figure]:
    """Figures of appearance at each size, of both sets together, and of subjects found, for each set."""
    assert request.data is not None
    figures: list[Figure] = []
    for size in sorted({size for drawn in sets.values() for size in drawn.sizes}):
        asked = [one for drawn in sets.values() for one in drawn.asked(size)]
        pictures = torch.cat([drawn.sizes[size] for drawn in sets.values()])
        figures += art_look.figures(asked, pictures, request.data, tower, request.seed)
        for name, drawn in sets.items():
            if size > min(drawn.sizes):
                figures += retrieval(name, _enlarged(drawn, size, tower), tower, candidates(name), f" at {size} px")
    return figures


def _enlarged(drawn: Drawn, size: int, tower: Tower) -> Drawn:
    """The items that have drawings of a larger size, with these drawings."""
    pixels = art_look.small(drawn.sizes[size])
    count = len(pixels)
    return replace(
        drawn,
        items=drawn.items[:count],
        pixels=pixels,
        features=tower.features(pixels),
        true_pixels=drawn.true_pixels[:count],
        true_features=drawn.true_features[:count],
    )


def further(pipeline: CascadePipeline, request: Request, tower: Tower) -> list[Figure]:
    """Figures of appearance in styles on which the judge was not trained; none if the request does not ask for any."""
    assert request.data is not None
    asked = art_look.further(request.data, request.further, request.seed) if request.further else []
    sizes = [size for size in measured_sizes(pipeline, request) if size <= art_look.FURTHER_SIZE]
    if not asked or not sizes:
        return []
    counts = {**dict.fromkeys(sizes, len(asked)), report.base_resolution(pipeline): len(asked)}
    drawn = report.draw_stages(pipeline, [one.prompt for one in asked], request, counts)
    figures: list[Figure] = []
    for size in sizes:
        pictures = torch.stack([from_pil(picture) for picture in drawn[size]])
        figures += art_look.figures(asked, pictures, request.data, tower, request.seed, ", further styles")
    return figures


def retrieval(name: str, drawn: Drawn, tower: Tower, concepts: Sequence[Concept], where: str = "") -> list[Figure]:
    """Rate at which a picture's own subject ranks first, or in the first ten, of the set; and the ceiling's rate.

    where: suffix of the figures' names, such as the size of the pictures.
    """
    texts = tower.place_texts([concept.words for concept in concepts])
    own = torch.tensor([concepts.index(item.concept) for item in drawn.items])

    def ranks(features: Tensor) -> Tensor:
        scores = tower.place_features(features) @ texts.T
        return (scores > scores.gather(1, own[:, None])).sum(dim=1)

    drawn_ranks, true_ranks = ranks(drawn.features), ranks(drawn.true_features)
    figures = []
    for most in (1, 10):
        title = f"retrieval at {most} of {len(concepts)}, {name} subjects{where}"
        ceiling = float((true_ranks < most).double().mean())
        (figure,) = share(title, (drawn_ranks < most).tolist(), ceiling)
        figures.append(figure)
        if ceiling > 0:
            relative = f"{title}, of the true pictures'"
            figures.append(Figure(relative, figure.value / ceiling, "share", "higher", figure.count, 1.0))
    return figures


def likeness(drawn: Drawn, others: Tensor, tower: Tower, seed: int) -> list[Figure]:
    """Distances of the drawn set to held-out pictures, and precision and recall; the floor is that of true pictures.

    The floor compares the true pictures of the prompts with the same held-out ones, in equal numbers.
    """
    if min(len(drawn.items), len(others)) <= NEIGHBOURS + 1:
        return []  # a small limit: too few for neighbourhoods
    known = tower.features(others).double()
    centre, spread = known.mean(dim=0), known.std(dim=0).square().mean().sqrt()
    known, ours, true = ((part.double() - centre) / spread for part in (known, drawn.features, drawn.true_features))

    def sliced(part: Tensor) -> float:
        return sliced_wasserstein(part, known, generator(seed, "art suite", "directions"))

    count = len(ours)
    precision, recall = precision_and_recall(known, ours)
    true_precision, true_recall = precision_and_recall(known, true)
    return [
        Figure("sliced Wasserstein distance", sliced(ours), "spread", "lower", count, sliced(true)),
        Figure("kernel distance", kernel_distance(ours, known), "", "lower", count, kernel_distance(true, known)),
        Figure("precision", precision, "share", "higher", count, true_precision),
        Figure("recall", recall, "share", "higher", len(known), true_recall),
    ]


def copies(name: str, drawn: Drawn, training: Art, known: Tensor) -> list[Figure]:
    """Share of pictures that nearly repeat one of the training split, in pixels and in features."""
    numbers = {concept: index for index, concept in enumerate(training.distinct())}
    groups = torch.tensor([numbers[concept] for concept in training.concepts])
    pixels = to_float(training.pixels).flatten(1)
    figures = []
    for what, ours, true, theirs in (
        ("pixels", drawn.pixels.flatten(1), drawn.true_pixels.flatten(1), pixels),
        ("features", drawn.features, drawn.true_features, known),
    ):
        outcomes = near_copies(ours, theirs, groups)
        # A true training picture is its own copy, so the reference exists only for unseen subjects.
        reference = sum(near_copies(true, theirs, groups)) / len(outcomes) if name == "unseen" else None
        title = f"near-copies in {what}, {name} subjects"
        figures.append(Figure(title, sum(outcomes) / len(outcomes), "share", "lower", len(outcomes), reference))
    return figures


def styles(sets: Sequence[Drawn], tower: Tower) -> list[Figure]:
    """Rate at which the tower recognizes the requested style: over all, and for each style."""
    asked = [item.style for drawn in sets for item in drawn.items]
    ours = tower.read_styles(torch.cat([drawn.pixels for drawn in sets]))
    true = tower.read_styles(torch.cat([drawn.true_pixels for drawn in sets]))
    figures = []
    for title, members in [("style obeyed", set(STYLES)), *((f"style obeyed: {style}", {style}) for style in STYLES)]:
        chosen = [index for index, style in enumerate(asked) if style in members]
        right = [[read[index] == asked[index] for index in chosen] for read in (ours, true)]
        figures += share(title, right[0], sum(right[1]) / max(1, len(chosen)))
    return figures


def _sheet(sets: Sequence[Drawn]) -> list[tuple[Image.Image, str]]:
    """Each drawn picture followed by its true one, with equal numbers from each set."""
    shown = []
    for drawn in sets:
        true = to_pil(drawn.true_pixels)
        for index, item in enumerate(drawn.items[: _PAIRS_SHOWN // len(sets)]):
            shown += [(drawn.pictures[index], item.prompt), (true[index], "true")]
    return shown
