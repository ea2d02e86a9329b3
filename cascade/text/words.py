"""The words of a prompt, and the token embeddings of each."""

from __future__ import annotations

import re

from cascade.text.t5 import TextEncoder


def words_of(encoder: TextEncoder, prompt: str) -> dict[str, list[int]]:
    """Each word, in order of the prompt -> the rows of its tokens in the embedding.

    A repeated word has the rows of all its occurrences. Words beyond the encoder's length are left out.
    """
    text, spans = encoder.spans(prompt)
    rows: dict[str, list[int]] = {}
    for match in re.finditer(r"[\w'-]+", text):
        own = [row for row, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
        if own:
            rows.setdefault(match.group(), []).extend(own)
    return rows
