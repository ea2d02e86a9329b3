"""Pipeline -> folder, or the hub: the counterpart of `cascade.load`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from cascade.card import CARD, MARK, PICTURES, Card, card_text
from cascade.checkpoint import atomic_folder, read_json, save_stage, write_json, write_text
from cascade.config.common import FORMAT_VERSION
from cascade.errors import CascadeError
from cascade.files.paths import plain_path
from cascade.files.text import read_text
from cascade.slots import StageSlot
from cascade.text.captions import Styles
from cascade.text.t5 import TextEncoder


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
