"""Words that occur in no caption, with the concept of each, for measuring a finished encoder.

`held_out_words.tsv`: text, concept, kind (synonym, colour, plural, misspelling), and what the text was held out from:
"captions" alone, or "everything", which means WordNet's texts as well. Synonyms come from WordNet's synonym sets and
by hand, the rest by program. `concept_names.txt`: the names of everything drawn in the art, the retrieval's answers.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from text_encoder.texts import words_in

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class HeldOut:
    """One test case: a text and the concept name that it means."""

    text: str
    concept: str
    kind: str
    held_out_from: str

    def words(self) -> set[str]:
        """The words that are held out: "scarlet" of "scarlet heart", whose concept is "red heart"."""
        return set(words_in(self.text)) - set(words_in(self.concept))


def held_out_words() -> list[HeldOut]:
    """All questions, in the order of the file."""
    with (FOLDER / "held_out_words.tsv").open(encoding="utf-8", newline="") as file:
        return [HeldOut(**row) for row in csv.DictReader(file, delimiter="\t")]


def concept_names() -> list[str]:
    """The names of everything drawn in the art, in alphabetical order."""
    return (FOLDER / "concept_names.txt").read_text(encoding="utf-8").splitlines()


def words_unseen_in_training() -> set[str]:
    """The words held out from everything: no text that the encoder is trained on may have one."""
    return {word for each in held_out_words() if each.held_out_from == "everything" for word in each.words()}
