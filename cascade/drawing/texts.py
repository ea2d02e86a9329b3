"""Embeddings of the tasks' texts; each text is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
