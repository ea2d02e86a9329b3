"""Changes to captions that are made for each view: templates, a trigger, and tags that move or are left out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from cascade.config.data import WordingConfig

PLACE = "{}"
"""The caption's place in a template."""
PLAIN = WordingConfig()
"""Captions as they are."""
_END = re.compile(r"[\s_-]*\(?\d*\)?$")
_BETWEEN = re.compile(r"[\s_-]+")


def worded(caption: str, wording: WordingConfig, rng: random.Random) -> str:
    """A caption as a view has it. Without changes no random number is drawn."""
    if wording == PLAIN:
        return caption
    if wording.shuffle_tags or wording.tag_dropout:
        caption = _tags(caption, wording, rng)
    if wording.templates:
        caption = rng.choice(wording.templates).replace(PLACE, caption)
    return _triggered(caption, wording)


def wordings(caption: str, wording: WordingConfig) -> Iterator[str]:
    """Every wording of a caption, if tags stay as they are."""
    for template in wording.templates or (PLACE,):
        yield _triggered(template.replace(PLACE, caption), wording)


def has_endless_wordings(wording: WordingConfig) -> bool:
    """Whether `wordings` cannot list what `worded` makes."""
    return wording.shuffle_tags or wording.tag_dropout > 0


def caption_of_name(path: Path, part: str) -> str:
    """The words in the name of a file, or (part: folder) of the folder around it, without a number at the end."""
    name = path.stem if part == "file" else path.parent.name
    return _BETWEEN.sub(" ", _END.sub("", name)).strip()


def _triggered(caption: str, wording: WordingConfig) -> str:
    return caption if wording.trigger is None else f"{wording.trigger}, {caption}"


def _tags(caption: str, wording: WordingConfig, rng: random.Random) -> str:
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, rest = tags[: wording.keep_tags], tags[wording.keep_tags :]
    if wording.shuffle_tags:
        rng.shuffle(rest)
    kept = [tag for tag in rest if not wording.tag_dropout or rng.random() >= wording.tag_dropout]
    return ", ".join([*first, *kept]) or caption
