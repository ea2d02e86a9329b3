"""Models on the Hugging Face hub: downloads only the files that are needed, and explains refused access."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from cascade.errors import DownloadError

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
