"""Training on drawn scenes to bind attributes: each word of an object's phrase should encode the whole object.

Span corruption does not train this: in `a red circle and a blue square` either colour may precede either shape, so the
order does not help to guess hidden words. Nor does the teacher, whose embedding of that sentence is nearly that of
`a blue circle and a red square`. A drawing network that attends to `circle` must find `red` there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cascade.data.scenes import (
    COLOURS,
    OPPOSITE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    describe,
    plural,
    random_scene,
)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "role": ("object", "background"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "relation": tuple(OPPOSITE),
    "place": tuple(PLACES),
    "count": ("1", "2", "3", "4"),
    "background": ("white", *COLOURS),
}
"""The predicted attributes, with the possible answers for each."""
UNSAID = -100
"""Label of attributes that a caption does not mention, which cross-entropy ignores."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """A batch of captions: token ids and mask (B, L); truth (B, L, len(ATTRIBUTES)), numbers of answers or UNSAID."""

    ids: Tensor
    mask: Tensor
    truth: Tensor


def phrases(scene: Scene, caption: str) -> list[tuple[Span, dict[str, str]]]:
    """Character span of each object and of the background in the caption, with the mentioned attributes."""
    ground = f"{scene.background} background"
    found: list[tuple[Span, dict[str, str]]] = []
    if ground in caption:
        start = caption.index(ground)
        found.append(((start, start + len(ground)), {"role": "background", "background": scene.background}))
    counted = scene.relation is None
    for item in scene.objects[:1] if counted else scene.objects:
        said = {"role": "object", "shape": item.shape, "colour": item.colour, "background": scene.background}
        said["count"] = str(len(scene.objects) if counted else 1)
        if scene.place is not None and scene.place in caption:
            said["place"] = scene.place
        if scene.relation is not None and (scene.relation in caption or OPPOSITE[scene.relation] in caption):
            said["relation"] = scene.relation if item is scene.objects[0] else OPPOSITE[scene.relation]
        found.append((_span(item, int(said["count"]), caption, said), said))
    return found


def _span(item: SceneObject, count: int, caption: str, said: dict[str, str]) -> Span:
    """Character span of `[size] colour shape`; adds the size to `said` if mentioned."""
    words = f"{item.colour} {plural(item.shape) if count > 1 else item.shape}"
    start = caption.index(words)
    end = start + len(words)
    if caption[:start].endswith(f"{item.size} "):
        said["size"] = item.size
        start -= len(item.size) + 1
    return start, end


def read(scenes: Sequence[tuple[Scene, str]], tokenizer: Any) -> Reading:
    """Scenes with a caption each as one batch."""
    captions = [caption for _, caption in scenes]
    batch = tokenizer(captions, padding=True, return_offsets_mapping=True, return_tensors="pt")
    truth = torch.full((*batch["input_ids"].shape, len(ATTRIBUTES)), UNSAID)
    offsets = batch["offset_mapping"]
    for row, (scene, caption) in enumerate(scenes):
        for (start, end), said in phrases(scene, caption):
            own = (offsets[row, :, 1] > start) & (offsets[row, :, 0] < end) & (offsets[row, :, 1] > offsets[row, :, 0])
            answers = [
                names.index(said[attribute]) if attribute in said else UNSAID for attribute, names in ATTRIBUTES.items()
            ]
            truth[row, own] = torch.tensor(answers)
    return Reading(batch["input_ids"], batch["attention_mask"], truth)


def readings(tokenizer: Any, batch_size: int, seed: int) -> Iterator[Reading]:
    """Endless batches of new scenes, never of the pairs that drawing holds out."""
    rng = random.Random(seed)
    while True:
        scenes = [random_scene(rng) for _ in range(batch_size)]
        yield read([(scene, describe(scene, rng)) for scene in scenes], tokenizer)


def reading_head(width: int) -> torch.nn.Linear:
    """Layer from a state to the scores of all answers for all attributes; discarded after training."""
    return torch.nn.Linear(width, sum(map(len, ATTRIBUTES.values())))


def reading_loss(states: Tensor, reading: Reading, head: torch.nn.Linear) -> Tensor:
    """Mean cross-entropy over the attributes, of the states (B, L, d) of the objects' words."""
    scores = head(states.float()).split([len(names) for names in ATTRIBUTES.values()], dim=-1)
    losses = [
        cross_entropy(score.flatten(0, 1), reading.truth[:, :, number].flatten(), ignore_index=UNSAID)
        for number, score in enumerate(scores)
        if bool((reading.truth[:, :, number] != UNSAID).any())
    ]
    return torch.stack(losses).mean()
