"""Pipeline -> folder, or the hub, with its model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from cascade.config.data import FORMAT_VERSION
from cascade.config.stage import StageConfig, save_stage
from cascade.drawing.slots import StageSlot
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_folder, read_json, write_json, write_text
from cascade.files.paths import plain_path
from cascade.files.text import read_text
from cascade.resources.memory import StageCost
from cascade.text.language import Styles
from cascade.text.t5 import TextEncoder

# --- card ------------------------------------------------------------------------------------------------------------
# The card of a saved model: README.md with the front matter that the Hugging Face hub reads.

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


# --- save ------------------------------------------------------------------------------------------------------------
# Pipeline -> folder, or the hub: the counterpart of loading.


@dataclass(frozen=True)
class Parts:
    """The parts of a model. enlargers: the stages of `upscale` if they differ from those of the cascade.

    sheet: pictures of the card's prompts.
    """

    text_encoder: TextEncoder
    slots: Sequence[StageSlot]
    enlargers: Sequence[StageSlot] | None
    name: str
    license: str
    card: Card
    sheet: Image.Image | None = None
    styles: Styles = field(default_factory=Styles)


def write_model(folder: str | Path, model: Parts, dtype: torch.dtype | None = None) -> None:
    """Write one folder: cascade.json, text_encoder/ and one folder per stage; see `CascadePipeline.save_pretrained`."""
    text_encoder, slots, enlargers = model.text_encoder, model.slots, model.enlargers
    folder = plain_path(folder)
    if folder.exists() and not _may_be_replaced(folder):
        raise CascadeError(f"{folder}: holds other files; name a new or empty folder for the cascade")
    with atomic_folder(folder) as temporary:
        text_encoder.save_pretrained(temporary / "text_encoder")
        for slot in {slot.config.name: slot for slot in [*(enlargers or ()), *slots]}.values():
            weights = slot.load().network.state_dict()
            save_stage(temporary / slot.config.name, slot.config, weights, dtype, text_encoder.reading)
        write_json(
            temporary / "cascade.json",
            {
                "format": FORMAT_VERSION,
                "name": model.name,
                "license": model.license,
                "stages": [slot.config.name for slot in slots],
                **({} if enlargers is None else {"enlargers": [slot.config.name for slot in enlargers]}),
                "max_text_length": text_encoder.max_length,
                "text_padded": text_encoder.padded,
                "captions": text_encoder.captions,
                "null_text": text_encoder.null_text,
                **styles_section(model.styles),
            },
        )
        _write_card(temporary, folder, model)


def styles_section(styles: Styles) -> dict[str, object]:
    """The section of cascade.json; none without styles, as in earlier versions."""
    section = {"words": list(styles.words), "default": styles.default}
    return {"styles": {name: value for name, value in section.items() if value}} if any(section.values()) else {}


def _write_card(temporary: Path, folder: Path, model: Parts) -> None:
    """README.md and its pictures; a card that somebody wrote by hand stays."""
    old = folder / CARD
    if old.is_file() and MARK not in read_text(old):
        shutil.copy(old, temporary / CARD)
        if (folder / PICTURES).is_dir():
            shutil.copytree(folder / PICTURES, temporary / PICTURES)
        return
    if model.sheet is not None or model.card.pictures:
        (temporary / PICTURES).mkdir()
    if model.sheet is not None:
        model.sheet.save(temporary / PICTURES / "sheet.png")
    for path in model.card.pictures.values():
        shutil.copy(path, temporary / PICTURES / path.name)
    configs = [slot.config for slot in model.slots]
    write_text(temporary / CARD, card_text(model.name, model.license, configs, model.card, model.sheet is not None))


@contextmanager
def model_for_hub(repo: str, private: bool) -> Iterator[Path]:
    """A folder for the caller to fill; it is then uploaded to a model repository of the Hugging Face hub."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        yield folder
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)


def _may_be_replaced(path: Path) -> bool:
    """Whether `path` is an empty folder, or holds a cascade and nothing else, so that all of it may be replaced."""
    if not path.is_dir():
        return False
    there = {entry.name for entry in path.iterdir()}
    if "cascade.json" not in there:
        return not there
    index = read_json(path / "cascade.json")
    stages = [*_names(index.get("stages")), *_names(index.get("enlargers"))]
    return there <= {"cascade.json", "text_encoder", CARD, PICTURES, *stages}


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
