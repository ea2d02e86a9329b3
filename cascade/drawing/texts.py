"""The texts of pictures: which prompts they follow, by phase and region, and their embeddings, each encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.conditioning import TextEmbeddings, join
from cascade.drawing.batches import Spoken, Texts
from cascade.drawing.edit import region_mask
from cascade.drawing.task import Task
from cascade.text.language import Phase, Portion, read_prompt

if TYPE_CHECKING:
    from cascade.drawing.recipe import Recipe


# --- script ----------------------------------------------------------------------------------------------------------
# The script of a picture: the prompts that it follows, by phase of sampling and by region.


@dataclass(frozen=True)
class Line:
    """One prompt of a phase. weight: see `Portion`. region: index in the recipe; None: the whole picture."""

    text: str
    weight: float = 1.0
    region: int | None = None


@dataclass(frozen=True)
class Scene:
    """A phase: the share of the steps at which it starts, its prompts, and its negative prompts."""

    start: float
    own: tuple[Line, ...]
    null: tuple[Line, ...]

    @property
    def is_plain(self) -> bool:
        """Whether there is one prompt of weight 1, and one negative prompt."""
        return len(self.own) == len(self.null) == 1 and self.own[0].weight == 1


Script = tuple[Scene, ...]
"""The phases of a picture in order, the first from 0."""


def script_of(recipe: Recipe) -> Script:
    """The script in a recipe. Raises PromptSyntaxError for a prompt in the prompt language with a mistake."""
    regions = tuple(region.prompt for region in recipe.regions)
    return _script(recipe.prompt, recipe.negative_prompt, regions, recipe.language)


@lru_cache(maxsize=1024)
def _script(prompt: str, negative: str, regions: tuple[str, ...], language: bool) -> Script:
    tracks = [(_phases(prompt, language), None), *((_phases(text, language), i) for i, text in enumerate(regions))]
    nulls = _phases(negative, language)
    starts = sorted({phase.start for phases in [nulls, *(phases for phases, _ in tracks)] for phase in phases})
    return tuple(
        Scene(
            start,
            tuple(Line(one.text, one.weight, region) for phases, region in tracks for one in _acting(phases, start)),
            tuple(Line(one.text, one.weight) for one in _acting(nulls, start)),
        )
        for start in starts
    )


def _phases(text: str, language: bool) -> tuple[Phase, ...]:
    return read_prompt(text) if language else (Phase(0.0, (Portion(text),)),)


def _acting(phases: Sequence[Phase], share: float) -> tuple[Portion, ...]:
    return [phase for phase in phases if phase.start <= share][-1].portions


def layered(masks: Sequence[Tensor]) -> list[Tensor]:
    """Weights of the ground and of each region, which add up to 1 in each pixel; a later region lies above.

    masks: (h, w) in [0, 1], of the regions in order.
    """
    above, weights = torch.ones_like(masks[0]), list[Tensor]()
    for mask in reversed(masks):
        weights.insert(0, mask * above)
        above = above * (1 - mask)
    return [above, *weights]


# --- texts -----------------------------------------------------------------------------------------------------------
# Embeddings of the tasks' texts; each text is encoded once.

KEPT = 256
"""Number of embeddings kept between two calls."""

Encode = Callable[[Sequence[str]], TextEmbeddings]
"""Texts -> their embeddings, all padded to one length: sums over more tokens may differ in the last bits, and a picture
must not depend on the length of other pictures' texts."""
Windows = Callable[[str], list[str]]
"""A text -> its parts within the encoder's limit; see `TextEncoder.windows`."""
Key = str | tuple[str] | Task
"""A text, a text that is read in windows, or a task with embeddings of its own."""


class RecentTexts:
    """Recently used embeddings, so that a series of equal prompts is encoded once."""

    def __init__(self, encode: Encode, windows: Windows | None = None) -> None:
        """windows: for recipes whose `long_prompts` is "chunk"."""
        self._encode, self._windows = encode, windows
        self._known: dict[str, TextEmbeddings] = {}

    def of(self, tasks: Sequence[Task]) -> Rows:
        """Encode the new texts of `tasks`; returns the rows of any batch of them."""
        keys = dict.fromkeys(_key(task, text) for task in tasks for text in _read(task))
        parts = {key: self._parts(key) for key in keys}
        self._learn(dict.fromkeys(part for each in parts.values() for part in each))
        known: dict[Key, TextEmbeddings] = {key: _joined([self._known[part] for part in parts[key]]) for key in keys}
        known |= {task: task.text for task in tasks if task.text is not None}
        for text in list(self._known)[: max(0, len(self._known) - KEPT)]:
            del self._known[text]
        return Rows(known)

    def _parts(self, key: str | tuple[str]) -> list[str]:
        if isinstance(key, str):
            return [key]
        assert self._windows is not None, "this engine reads no text in windows"
        return self._windows(key[0])

    def _learn(self, texts: Iterable[str]) -> None:
        """Encode unknown texts, and mark all of `texts` as the most recently used."""
        missing = [text for text in texts if text not in self._known]
        if missing:
            embeddings = self._encode(missing)
            self._known |= {text: embeddings.select([row]) for row, text in enumerate(missing)}
        self._known |= {text: self._known.pop(text) for text in texts}


class Rows:
    """The texts of batches of tasks."""

    def __init__(self, known: Mapping[Key, TextEmbeddings]) -> None:
        self._table, self._row = join(list(known.values())), {key: place for place, key in enumerate(known)}
        self._widths = {key: each.tokens.shape[1] for key, each in known.items()}

    def width(self, task: Task) -> int:
        """Padded number of tokens of a task's longest text: equal within a batch, whatever else is drawn."""
        if task.text is not None:
            return self._table.tokens.shape[1]
        return max(self._widths[_key(task, text)] for text in _read(task))

    def __call__(self, batch: Sequence[Task], size: tuple[int, int]) -> Texts:
        """The texts of tasks with scripts of one form and one `width`. size: height and width of their pictures."""
        width = self.width(batch[0])
        scripts = [script_of(task.recipe) for task in batch]
        first = [_key(task, script[0].own[0].text) for task, script in zip(batch, scripts, strict=True)]
        own = self._select([key if task.text is None else task for task, key in zip(batch, first, strict=True)], width)
        null = self._select(
            [_key(task, script[0].null[0].text) for task, script in zip(batch, scripts, strict=True)], width
        )
        if form_of(scripts[0]) is None:
            return Texts(own, null)
        maps = [_maps(task, size) for task in batch]

        def spoken(lines: Sequence[Line]) -> Spoken:
            keys = [_key(task, line.text) for task, line in zip(batch, lines, strict=True)]
            return _spoken(lines, self._select(keys, width), maps)

        scenes = [
            (
                each[0].start,
                [spoken(lines) for lines in zip(*(scene.own for scene in each), strict=True)],
                [spoken(lines) for lines in zip(*(scene.null for scene in each), strict=True)],
            )
            for each in zip(*scripts, strict=True)
        ]
        return Texts(own, null, scenes)

    def _select(self, keys: Sequence[Key], width: int) -> TextEmbeddings:
        chosen = self._table.select([self._row[key] for key in keys])
        return TextEmbeddings(chosen.tokens[:, :width], chosen.mask[:, :width])


def _key(task: Task, text: str) -> str | tuple[str]:
    return (text,) if task.recipe.long_prompts == "chunk" else text


def _joined(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """The windows of one text, one after the other, padded to the sum of their lengths."""
    if len(parts) == 1:
        return parts[0]
    joined = TextEmbeddings.from_rows([torch.cat([part.rows()[0] for part in parts])])
    return joined.padded(sum(part.tokens.shape[1] for part in parts))


def form_of(script: Script) -> object | None:
    """What the scripts of a batch have in common: shares of the steps and kinds of prompts; None: a single prompt."""
    if len(script) == 1 and script[0].is_plain:
        return None
    return tuple((scene.start, tuple(line.region for line in scene.own), len(scene.null)) for scene in script)


def _read(task: Task) -> Iterator[str]:
    """The texts of a task that an encoder reads."""
    for scene in script_of(task.recipe):
        for line in (*scene.own, *scene.null):
            if task.text is None or line in scene.null:
                yield line.text


def _maps(task: Task, size: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """(the regions, the weights of the ground and of each region), all (h, w)."""
    masks = [region_mask(region, task.masks, size) for region in task.recipe.regions]
    return masks, layered(masks) if masks else [torch.ones(1, 1)]


def _spoken(lines: Sequence[Line], text: TextEmbeddings, maps: Sequence[tuple[list[Tensor], list[Tensor]]]) -> Spoken:
    """One prompt of each picture of a batch."""
    region = lines[0].region
    place = 0 if region is None else region + 1
    weights = [line.weight * each[place] for line, (_, each) in zip(lines, maps, strict=True)]
    inside = None if region is None else torch.stack([masks[region] for masks, _ in maps])[:, None]
    return Spoken(text, torch.stack(weights)[:, None], inside)
