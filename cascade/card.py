"""The card of a saved model: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cascade.config.stage import StageConfig
from cascade.cost import StageCost

CARD, PICTURES = "README.md", "card"
"""The card within a model's folder, and the folder of its pictures."""
MARK = "<!-- written by cascade; a card without this line is kept when the model is saved again -->"
_CC = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-3.0", "cc-by-sa-3.0")
_CODE = ("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "openrail", "creativeml-openrail-m", "unknown")
_SPDX = frozenset(_CC + _CODE)
"""Licences by the names that the hub has for them; every other is `other`, with its own name."""


@dataclass(frozen=True)
class Card:
    """What a model's author adds to its card. sections: heading and Markdown text, in order.

    prompts: drawn with seeds from 0 for the sheet. pictures: files shown after the sheet, by the text under them.
    """

    sections: Sequence[tuple[str, str]] = ()
    prompts: Sequence[str] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)


def card_text(name: str, license: str, stages: Sequence[StageConfig], card: Card, sheet: bool) -> str:
    """The Markdown of README.md. sheet: whether `card/sheet.png` exists, with pictures for the card's prompts."""
    parts = [_front_matter(name, license), f"# {name}", _introduction(stages)]
    if sheet:
        shown = "; ".join(card.prompts)
        parts.append(f"![pictures drawn by {name}]({PICTURES}/sheet.png)\n\nDrawn with seeds 0, 1, 2, ... for: {shown}")
    parts.append(f"## Draw\n\n```python\n{_python()}\n```\n\n```sh\n{_shell()}\n```")
    parts.append(f"## Stages\n\n{_table(stages)}")
    parts += [f"## {heading}\n\n{text}" for heading, text in card.sections]
    parts += [f"![{text}]({PICTURES}/{path.name})\n\n{text}" for text, path in card.pictures.items()]
    parts.append(f"## Licence\n\nThe weights: {license}.")
    return "\n\n".join(parts) + f"\n\n{MARK}\n"


def _front_matter(name: str, license: str) -> str:
    """What the hub reads: licence, library, task, tags."""
    known = license.lower() in _SPDX
    lines = [f"license: {license.lower()}"] if known else ["license: other", f"license_name: {_quoted(license)}"]
    return "\n".join(
        [
            "---",
            *lines,
            "library_name: cascade-diffusion",
            "pipeline_tag: text-to-image",
            "tags: [text-to-image, diffusion, pixel-space, cascade]",
            f"model_name: {_quoted(name)}",
            "---",
        ]
    )


def _quoted(text: str) -> str:
    """A YAML string, whatever the text holds."""
    return json.dumps(text)


def _introduction(stages: Sequence[StageConfig]) -> str:
    sides = " -> ".join(f"{stage.resolution} px" for stage in stages)
    return (
        f"A text-to-image cascade in pixel space, {sides}, for the Python package `cascade-diffusion`."
        " The first stage draws from a prompt, each further one enlarges the picture."
    )


def _python() -> str:
    return (
        "from cascade import CascadePipeline\n\n"
        'pipeline = CascadePipeline.from_pretrained("FOLDER-OR-HUB-ID")\n'
        'pipeline("a prompt", seed=1).images[0].save("picture.png")'
    )


def _shell() -> str:
    return 'cascade generate --model FOLDER-OR-HUB-ID "a prompt" --seed 1'


def _table(stages: Sequence[StageConfig]) -> str:
    rows = ["| stage | pixels | weights | sampler | steps | guidance |", "| --- | --- | --- | --- | --- | --- |"]
    for stage in stages:
        sampling = stage.sampling
        millions = f"{StageCost(stage).parameters / 1e6:.1f} million"
        rows.append(
            f"| {stage.name} | {stage.resolution} | {millions} | {sampling.sampler.kind} | {sampling.steps} |"
            f" {sampling.guidance:g} |"
        )
    return "\n".join(rows)
