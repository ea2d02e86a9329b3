"""Captions of a picture, made by rule from an emoji's name, its keywords and the style of the drawing."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Style:
    """Names of a style in captions: `a {noun} of a fox`, `a {look} of a fox`, `a fox, {words}`, `a fox, {look}`."""

    words: str
    look: str
    noun: str


STYLES = {
    "noto": Style("noto style", "shaded cartoon emoji", "noto emoji"),
    "twemoji": Style("twemoji style", "simple flat sticker", "twemoji"),
    "fluent_flat": Style("fluent flat style", "flat vector icon", "fluent flat emoji"),
    "fluent_color": Style("fluent color style", "glossy gradient icon", "fluent color emoji"),
    "fluent_3d": Style("fluent 3d style", "soft 3d render", "fluent 3d emoji"),
    "fluent_mono": Style("fluent mono style", "black and white icon", "fluent mono emoji"),
}

STRAIGHT_QUOTES = str.maketrans("‘’“”", "''\"\"")
WITHOUT_ARTICLE = re.compile(r"(no|keycap|input) ")
# The rest of a name describes the subject further; the noun that decides singular or plural precedes it.
SUBJECT_ENDS = re.compile(r",| (?:with|in|of|on|over|and|holding|lifting)\b")
MANY = re.compile(r"(?<![suio'])s$|oes$|hips$")
VOWEL = re.compile(r"(?!uni|eu|ew|one\b)[aeiou]", re.IGNORECASE)
VOWEL_BY_SOUND = {"herb", "hourglass done", "hourglass not done", "x-ray"}
# Substances, games, adjectives, names and irregular plurals, which cannot be recognized by their spelling.
UNCOUNTED = frozenset(Path(__file__).with_name("uncounted.txt").read_text(encoding="utf-8").splitlines())


def caption_of(name: str) -> str:
    """The subject in plain words: `flag: Japan` -> `flag of Japan`, `keycap: 5` -> `keycap 5`.

    name: Unicode's short name, with straight quotes.
    """
    kind, colon, rest = name.partition(": ")
    if not colon:
        return name
    if kind == "flag":
        return f"flag of {rest}"
    if kind == "keycap":
        return f"keycap {rest}"
    if kind == "family":
        return f"family of {_people(rest)}"
    if kind == "couple with heart":
        return f"couple with a heart, {_people(rest)}"
    if kind == "kiss":
        return f"kiss between {_people(rest)}"
    if kind in ("person", "man", "woman"):
        return f"{kind} with a beard" if rest == "beard" else f"{kind} with {rest}"
    return f"{kind}, {rest}"


def _people(listed: str) -> str:
    """`man, woman, boy` -> `a man, a woman and a boy`."""
    people = [f"{_article(person)} {person}" for person in listed.split(", ")]
    return " and ".join([", ".join(people[:-1]), people[-1]])


def noun_phrase(caption: str, subgroup: str) -> str:
    """The caption with the article that it needs: `a fox`, `an owl`, `the flag of Japan`, `grapes`."""
    if caption.startswith("flag of ") or caption == "Statue of Liberty":
        return f"the {caption}"
    subject = SUBJECT_ENDS.split(caption)[0]
    bare = subgroup == "zodiac" or caption in UNCOUNTED or WITHOUT_ARTICLE.match(caption) or MANY.search(subject)
    return caption if bare else f"{_article(caption)} {caption}"


def _article(words: str) -> str:
    return "an" if words in VOWEL_BY_SOUND or VOWEL.match(words) else "a"


def captions_of(caption: str, subgroup: str, keywords: Sequence[str], style: Style, rng: random.Random) -> list[str]:
    """7 captions of a picture, and 3 more where the subject has at least two keywords.

    rng: chooses among the style's two names where only one is used, and the order of the keywords.
    """
    phrase = noun_phrase(caption, subgroup)
    made = [
        caption,
        f"{caption}, {style.words}",
        f"{caption}, {style.look}",
        f"a {style.noun} of {phrase}",
        f"a {style.look} of {phrase}",
        f"a {rng.choice((style.noun, style.look))} of {phrase} on a white background",
        f"{phrase} in {style.words}",
    ]
    if len(keywords) < 2:
        return made
    words = rng.sample(list(keywords), min(4, len(keywords)))
    names = (style.words, style.look)
    return [
        *made,
        ", ".join([caption, *words[:2], rng.choice(names)]),
        ", ".join(words),
        ", ".join([*words[:3], rng.choice(names)]),
    ]
