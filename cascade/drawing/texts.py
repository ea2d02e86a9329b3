"""Embeddings of the texts of tasks, each text encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from cascade.drawing.batches import Texts
from cascade.drawing.task import Task
from cascade.text.embeddings import TextEmbeddings, join

KEPT = 256
"""Embeddings that stay between two calls."""

Encode = Callable[[Sequence[str]], TextEmbeddings]
"""Texts -> their embeddings, all padded to one length: sums over more tokens may differ in their last bits, and a
picture must not depend on how long the texts of other pictures are."""


class RecentTexts:
    """Recently used embeddings: a run of equal prompts is encoded once."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._known: dict[str, TextEmbeddings] = {}

    def of(self, tasks: Sequence[Task]) -> Callable[[Sequence[Task]], Texts]:
        """Encode what is new in `tasks`; gives the rows of any batch of them."""
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
        """Encode those that are not known, and put all of them last in the order in which they are forgotten."""
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
