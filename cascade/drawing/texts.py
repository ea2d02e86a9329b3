"""Embeddings of the tasks' texts; each text is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cascade.drawing.batches import Spoken, Texts
from cascade.drawing.edit import region_mask
from cascade.drawing.script import Line, Script, layered, script_of
from cascade.drawing.task import Task
from cascade.text.embeddings import TextEmbeddings, join

KEPT = 256
"""Number of embeddings kept between two calls."""

Encode = Callable[[Sequence[str]], TextEmbeddings]
"""Texts -> their embeddings, all padded to one length: sums over more tokens may differ in the last bits, and a picture
must not depend on the length of other pictures' texts."""
Rows = Callable[[Sequence[Task], tuple[int, int]], Texts]
"""(a batch of tasks with scripts of one form, height and width of their pictures) -> its texts."""


class RecentTexts:
    """Recently used embeddings, so that a series of equal prompts is encoded once."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._known: dict[str, TextEmbeddings] = {}

    def of(self, tasks: Sequence[Task]) -> Rows:
        """Encode the new texts of `tasks`; returns a function from a batch of them to its rows."""
        texts = dict.fromkeys(text for task in tasks for text in _read(task))
        self._learn(texts)
        known: dict[str | Task, TextEmbeddings] = {text: self._known[text] for text in texts}
        known |= {task: task.text for task in tasks if task.text is not None}
        table, row = join(list(known.values())), {key: place for place, key in enumerate(known)}
        for text in list(self._known)[: max(0, len(self._known) - KEPT)]:
            del self._known[text]

        def rows(batch: Sequence[Task], size: tuple[int, int]) -> Texts:
            scripts = [script_of(task.recipe) for task in batch]
            first = [script[0].own[0].text for script in scripts]
            keys = [row[text if task.text is None else task] for task, text in zip(batch, first, strict=True)]
            own, null = table.select(keys), table.select([row[script[0].null[0].text] for script in scripts])
            if form_of(scripts[0]) is None:
                return Texts(own, null)
            maps = [_maps(task, size) for task in batch]

            def spoken(lines: Sequence[Line]) -> Spoken:
                return _spoken(lines, table.select([row[line.text] for line in lines]), maps)

            scenes = [
                (
                    each[0].start,
                    [spoken(lines) for lines in zip(*(scene.own for scene in each), strict=True)],
                    [spoken(lines) for lines in zip(*(scene.null for scene in each), strict=True)],
                )
                for each in zip(*scripts, strict=True)
            ]
            return Texts(own, null, scenes)

        return rows

    def _learn(self, texts: Iterable[str]) -> None:
        """Encode unknown texts, and mark all of `texts` as the most recently used."""
        missing = [text for text in texts if text not in self._known]
        if missing:
            embeddings = self._encode(missing)
            self._known |= {text: embeddings.select([row]) for row, text in enumerate(missing)}
        self._known |= {text: self._known.pop(text) for text in texts}


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
