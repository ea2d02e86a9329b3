"""Reader for WordNet as installed by Debian's `wordnet-base`: lemmas, their frequency, senses, glosses.

The database's own format (wndb(5WN)): `index.POS` lists each lemma's senses, the commonest first; `data.POS`
holds one synonym set a line; `cntlist.rev` counts each sense in texts that people tagged by hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

PARTS_OF_SPEECH = ("noun", "verb", "adj")
# Lexicographer files (lexnames(5WN)) of what can be drawn: animals, artifacts, bodies, food, groups, places,
# things, people, phenomena, plants, shapes, substances.
DRAWABLE = {"05", "06", "08", "13", "15", "17", "18", "19", "20", "25", "27"}


@dataclass(frozen=True)
class Sense:
    """One synonym set: `words` with equal meaning, `gloss` for the definition, `parents` for the hypernyms."""

    words: tuple[str, ...]
    gloss: str
    drawable: bool
    parents: tuple[str, ...]


@dataclass(frozen=True)
class WordNet:
    """`senses`: (lemma, part of speech) -> its commonest sense. `counts`: lemma -> times it was tagged."""

    senses: dict[tuple[str, str], Sense]
    counts: Counter[str]


def read_wordnet(folder: Path) -> WordNet:
    """Lower-case lemmas of nouns, verbs and adjectives with their commonest sense; proper names are left out."""
    if not (folder / "cntlist.rev").exists():
        raise click.ClickException(
            f"{folder}: has no cntlist.rev, so it is not WordNet's dict folder; Debian's wordnet-base puts it in "
            "/usr/share/wordnet"
        )
    counts: Counter[str] = Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, _, count = line.split()
        counts[key.split("%")[0].replace("_", " ")] += int(count)
    senses = {}
    for part in PARTS_OF_SPEECH:
        sets = read_sets(folder / f"data.{part}")
        for line in (folder / f"index.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields = line.split()
            # lemma, part, senses, pointers p, p symbols, senses again, tagged senses, then the sets' offsets
            first = sets[fields[6 + int(fields[3])]]
            lemma = fields[0].replace("_", " ")
            if lemma in first.words:  # a proper name is capitalized in its set
                senses[lemma, part] = first
    return WordNet(senses, counts)


def read_sets(path: Path) -> dict[str, Sense]:
    """Offset -> synonym set."""
    rows = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition("|")
        rows[line[:8]] = (fields.split(), gloss.strip())
    names = {offset: words_of(fields) for offset, (fields, _) in rows.items()}
    return {
        offset: Sense(
            words=names[offset],
            gloss=gloss.split(";")[0].split("(")[0].strip() or gloss.split(";")[0].strip("() "),
            drawable=path.suffix == ".noun" and fields[1] in DRAWABLE,
            parents=tuple(names[parent][0] for parent in parents_of(fields)),
        )
        for offset, (fields, gloss) in rows.items()
    }


def words_of(fields: list[str]) -> tuple[str, ...]:
    """The set's words: after a hexadecimal count, each with a number behind it; "(p)" marks an adjective's place."""
    count = int(fields[3], 16)
    return tuple(word.split("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])


def parents_of(fields: list[str]) -> list[str]:
    """Offsets of the hypernym sets (pointer symbol @)."""
    start = 4 + 2 * int(fields[3], 16)
    pointers = fields[start + 1 : start + 1 + 4 * int(fields[start])]
    return [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] == "@"]
