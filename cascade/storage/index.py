"""Finding a model and its stages: a name, folder or hub id -> folders, and the content of cascade.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TypeVar, get_args

import torch

from cascade.conditioning import NullText
from cascade.config.data import Captions, TextReading, check_format
from cascade.errors import CascadeError, DownloadError, quoted
from cascade.files.atomic import read_json
from cascade.files.paths import expanded, plain_path
from cascade.files.tensors import stored_bytes
from cascade.storage import diffusers
from cascade.text.language import Styles
from cascade.text.t5_files import text_weights

# --- the hub ---------------------------------------------------------------------------------------------------------
# Models on the Hugging Face hub: downloads only the files that are needed, and explains refused access.

_READ = ["*.json", "*.safetensors", "*.model", "*.md"]
_FILTERS = ["safety_checker/*", "watermarker/*", "feature_extractor/*"]
"""Parts of diffusers' repositories that cascade does not use."""
_TEXT = ["text_encoder/*", "tokenizer/*"]
_HALF = ["*fp16*", "*bf16*"]
"""A second copy of the weights, in half precision."""


def may_be_on_hub(model: str | Path) -> bool:
    """Whether `model` has the form of a hub id and no local folder has the name of its first part."""
    text = str(model)
    looks_so = isinstance(model, str) and text.count("/") == 1 and not text.startswith((".", "/", "~", "\\"))
    looks_so = looks_so and not PureWindowsPath(text).drive
    return looks_so and not Path(text.partition("/")[0]).exists()


def download(repo: str, text: bool = True) -> Path:
    """The folder of a repository, downloaded once, without pickles or safety filters, weights in one precision.

    text: include the text encoder (a second stage shares that of the first). Half-precision files are fetched only from
    a repository without others. Raises DownloadError; for a gated repository it names the page of its licence.
    """
    without = _FILTERS + ([] if text else _TEXT)
    folder = _snapshot(repo, without + _HALF)
    is_diffusers = (folder / "model_index.json").is_file()
    return _snapshot(repo, without) if is_diffusers and not any(folder.glob("unet/*.safetensors")) else folder


def _snapshot(repo: str, ignore: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=_READ, ignore_patterns=ignore))
    except GatedRepoError:
        raise DownloadError(
            f"{repo}: its authors ask you to accept a licence first; do so at {constants.ENDPOINT}/{repo}, then log in"
            " with `hf auth login`"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(f"{repo}: neither a folder nor a model on the hub: {str(error).splitlines()[0]}") from None


# --- index -----------------------------------------------------------------------------------------------------------

NameT = TypeVar("NameT", bound=str)

LARGE_ENCODER = 1_000_000_000
"""Number of weights from which a text encoder counts as large. In float32 a smaller one costs little memory."""

BUNDLED = Path(__file__).parent.parent / "pretrained"
"""The cascade in the package."""


@dataclass(frozen=True)
class ModelIndex:
    """The content of a cascade's cascade.json, with folders as paths.

    enlargers: the stages of `upscale`; None: those of the cascade.
    """

    name: str
    license: str
    text_encoder: Path
    stages: tuple[Path, ...]
    enlargers: tuple[Path, ...] | None
    max_text_length: int
    text_padded: bool = False
    captions: Captions = "as_is"
    null_text: NullText = "encoded"
    styles: Styles = field(default_factory=Styles)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all stages, each once: those that draw, then those that only `upscale` uses."""
        return tuple(dict.fromkeys([*self.stages, *(self.enlargers or ())]))

    @property
    def halves_text(self) -> bool:
        """Whether the text encoder is bfloat16 if the stages have 16 bits, as IF's and T5-XXL are; else float32."""
        return self.text_padded or stored_bytes(text_weights(self.text_encoder), torch.int8) > LARGE_ENCODER

    @property
    def reading(self) -> TextReading:
        """The conversion of texts to tokens."""
        return TextReading(
            max_length=self.max_text_length,
            padded=self.text_padded,
            captions=self.captions,
            null_text=self.null_text,
        )


def read_index(model: str | Path | None = None) -> ModelIndex:
    """The index of a model: bundled, folder or hub id. Raises CascadeError naming what is missing or wrong."""
    folder = find_model(model)
    if diffusers.is_diffusers(folder):
        return _read_diffusers_index(folder)
    path = folder / "cascade.json"
    data = read_json(path)
    check_format(path, data.get("format"))
    reading = reading_of_index(data, path)
    return ModelIndex(
        name=str(data.get("name", folder.name)),
        license=str(data.get("license", "unstated")),
        text_encoder=folder / "text_encoder",
        stages=tuple(folder / name for name in _strings(data, "stages", path)),
        enlargers=tuple(folder / name for name in _strings(data, "enlargers", path)) if "enlargers" in data else None,
        max_text_length=reading.max_length,
        text_padded=reading.padded,
        captions=reading.captions,
        null_text=reading.null_text,
        styles=_styles(data, path),
    )


def reading_of_index(data: Mapping[str, object], path: Path) -> TextReading:
    """How a model reads its text, from its cascade.json at `path`. Raises CascadeError for invalid values."""
    length = data.get("max_text_length", 64)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise CascadeError(f"{path}: max_text_length: expected a whole number of tokens, not {quoted(length)}")
    return TextReading(
        max_length=length,
        padded=bool(data.get("text_padded", False)),
        captions=_one_of(get_args(Captions), data, "captions", "as_is", path),
        null_text=_one_of(get_args(NullText), data, "null_text", "encoded", path),
    )


def _read_diffusers_index(folder: Path) -> ModelIndex:
    """DeepFloyd IF in diffusers' layout: one stage and the text encoder."""
    return ModelIndex(
        name=folder.name,
        license=diffusers.read_license(folder),
        text_encoder=folder / "text_encoder",
        stages=(folder,),
        enlargers=None,
        max_text_length=diffusers.READING.max_length,
        text_padded=diffusers.READING.padded,
        captions=diffusers.READING.captions,
    )


def _one_of(known: Sequence[NameT], index: Mapping[str, object], key: str, default: NameT, path: Path) -> NameT:
    """The value of `key`, which must be one of the known names."""
    value = index.get(key, default)
    for name in known:
        if value == name:
            return name
    raise CascadeError(f"{path}: {key}: {quoted(value)}; expected one of {', '.join(known)}")


def _styles(index: Mapping[str, object], path: Path) -> Styles:
    """The section `styles`: {"words": [...], "default": ...}, both optional."""
    section = index.get("styles", {})
    known = {"words", "default"}
    if not isinstance(section, dict) or not section.keys() <= known:
        raise CascadeError(f"{path}: styles: {quoted(section)}; expected a section with words and default")
    words, default = section.get("words", []), section.get("default")
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise CascadeError(f"{path}: styles.words: {quoted(words)}; expected a list of style words")
    if default is not None and (not isinstance(default, str) or not default.strip()):
        raise CascadeError(f"{path}: styles.default: {quoted(default)}; expected style words, or leave it out")
    return Styles(tuple(words), default)


def _strings(index: dict[str, object], key: str, path: Path) -> list[str]:
    values = index.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise CascadeError(f"{path}: {key}: expected a list of stage names")
    return values


def find_model(model: str | Path | None) -> Path:
    """The folder of a model: the bundled one, a local folder, or a hub id (downloaded once)."""
    if model is None or model == "bundled":
        return BUNDLED
    folder = plain_path(model)
    if folder.is_dir():
        return folder
    if may_be_on_hub(model):
        return download(str(model))
    raise CascadeError(f"{model}: no such model folder; give a folder with cascade.json, a hub id, or `bundled`")


def find_stage(source: str | Path) -> Path:
    """The folder of one stage: itself, `stage` of a training run, or `model/stage` of a cascade."""
    source = expanded(str(source))
    path = Path(source)
    for candidate in (path, path / "stage"):
        if (candidate / "stage.json").is_file() or diffusers.is_diffusers(candidate):
            return candidate
    parent, _, name = source.rpartition("/")
    reason = ""
    try:
        if parent != "bundled" and may_be_on_hub(source):
            candidate = download(source, text=False)
            if diffusers.is_diffusers(candidate):
                return candidate
        elif parent == "bundled" or Path(parent).is_dir() or may_be_on_hub(parent):
            candidate = find_model(parent) / name
            if (candidate / "stage.json").is_file():
                return candidate
    except CascadeError as error:
        reason = f" ({error})"
    raise CascadeError(
        f"{source}: no stage here; give a folder with stage.json, a training run, model/stage, or DeepFloyd IF in"
        f" diffusers' layout{reason}"
    )
