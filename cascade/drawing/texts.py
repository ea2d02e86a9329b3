"""Embeddings of the tasks' texts; each text is encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cascade.drawing.batches import Texts
from cascade.drawing.task import Task
from cascade.text.embeddings import TextEmbeddings, join

KEPT = 256
"""Number of embeddings kept between two calls."""

Encode = Callable[[Sequence[str]], TextEmbeddings]
"""Texts -> their embeddings, all padded to one length: sums over more tokens may differ in the last bits, and a picture
must not depend on the length of other pictures' texts."""


class RecentTexts:
    """Recently used embeddings, so that a series of equal prompts is encoded once."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._known: dict[str, TextEmbeddings] = {}

    def of(self, tasks: Sequence[Task]) -> Callable[[Sequence[Task]], Texts]:
        """Encode the new texts of `tasks`; returns a function from a batch of them to its rows."""
        texts = dict.fromkeys(text for task in tasks for text in _read(task))
        self._learn(texts)
        known: dict[str | Task, TextEmbeddings] = {text: self._known[text] for text in texts}
        known |= {task: task.text for task in tasks if task.text is not None}
        table, row = join(list(known.values())), {key: place for place, key in enumerate(known)}
        for text in list(self._known)[: max(0, len(self._known) - KEPT)]:
            del self._known[text]

        def rows(batch: Sequence[Task]) -> Texts:
            return Texts(
                own=table.select([row[task.recipe.prompt if task.text is None else task] for task in batch]),
                null=table.select([row[task.recipe.negative_prompt] for task in batch]),
            )

        return rows

    def _learn(self, texts: Iterable[str]) -> None:
        """Encode unknown texts, and mark all of `texts` as the most recently used."""
        missing = [text for text in texts if text not in self._known]
        if missing:
            embeddings = self._encode(missing)
            self._known |= {text: embeddings.select([row]) for row, text in enumerate(missing)}
        self._known |= {text: self._known.pop(text) for text in texts}


def _read(task: Task) -> Iterator[str]:
    """The texts of a task that an encoder reads."""
    if task.text is None:
        yield task.recipe.prompt
    yield task.recipe.negative_prompt
