"""Models on the Hugging Face hub: only the files that are read, and a plain word when they may not be."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from cascade.errors import DownloadError

_READ = ["*.json", "*.safetensors", "*.model", "*.md"]
_FILTERS = ["safety_checker/*", "watermarker/*", "feature_extractor/*"]
"""Parts of diffusers' repositories that are not read."""
_TEXT = ["text_encoder/*", "tokenizer/*"]
_HALF = ["*fp16*", "*bf16*"]
"""The weights a second time, in half precision."""


def may_be_on_hub(model: str | Path) -> bool:
    """Whether `model` is written like a hub id, and no local folder is called like its first part."""
    text = str(model)
    looks_so = isinstance(model, str) and text.count("/") == 1 and not text.startswith((".", "/", "~", "\\"))
    looks_so = looks_so and not PureWindowsPath(text).drive
    return looks_so and not Path(text.partition("/")[0]).exists()


def download(repo: str, text: bool = True) -> Path:
    """The folder of a repository, downloaded once: no pickles, no filters, weights in one precision.

    text: with the text encoder, which a second stage shares with the first. Half-precision files are fetched only
    where a repository has no others. Raises CascadeError, for a gated repository with the page to accept its licence.
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
        raise DownloadError(
            f"{repo}: neither a folder nor a model that the hub gives: {str(error).splitlines()[0]}"
        ) from None
