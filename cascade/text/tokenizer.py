"""A tokenizer.json read by the library `tokenizers`: the same ids as transformers', without importing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.checkpoint import write_text
from cascade.errors import CascadeError
from cascade.files.parsed import read_json_file
from cascade.quoting import quoted

PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that use a tokenizer.json unchanged; others, such as T5Tokenizer, modify it on loading."""


class Tokenizer:
    """Texts -> token ids: the part of transformers' PreTrainedTokenizerFast that an encoder needs, with its names."""

    def __init__(self, folder: Path) -> None:
        """folder: holds tokenizer.json and tokenizer_config.json. Lets errors of `tokenizers` through."""
        from tokenizers import Tokenizer as Backend

        self._config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        settings = read_json_file(folder / "tokenizer_config.json")
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.backend_tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
        self.backend_tokenizer.encode_special_tokens = self.split_special_tokens
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        end = settings.get("eos_token")
        name = end.get("content") if isinstance(end, dict) else end
        self.eos_token_id = self.backend_tokenizer.token_to_id(name) if isinstance(name, str) else None

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        verbose: bool = True,  # noqa: ARG002 (transformers warns of long texts by it)
        return_offsets_mapping: bool = False,
    ) -> dict[str, Any]:
        """`input_ids` of a text, or of each text; on request `offset_mapping`, each token's place in the text."""
        one = isinstance(text, str)
        encoded = self.backend_tokenizer.encode_batch([text] if isinstance(text, str) else list(text))
        found: dict[str, Any] = {"input_ids": [each.ids for each in encoded]}
        if return_offsets_mapping:
            found["offset_mapping"] = [each.offsets for each in encoded]
        return {name: values[0] for name, values in found.items()} if one else found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        write_text(Path(folder) / "tokenizer_config.json", self._config)
        self.backend_tokenizer.save(str(Path(folder) / "tokenizer.json"))


def token_ids(tokenizer: Any, texts: str | Sequence[str]) -> Any:
    """The ids of a text, or of each text. Raises CascadeError for a panic; see `call`."""
    return call(tokenizer, texts)["input_ids"]


def call(tokenizer: Any, texts: str | Sequence[str], **options: bool) -> Any:
    """What a tokenizer gives for a text, or for each text.

    Raises CascadeError when `tokenizers` panics, as it does for contradictions in a tokenizer.json that show only in
    some texts: a panic of Rust is no `Exception`, and would end the program with a traceback.
    """
    try:
        return tokenizer(texts, verbose=False, **options)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        text = texts if isinstance(texts, str) else " ".join(texts)
        raise CascadeError(
            f"the text encoder's tokenizer.json fails on {quoted(text)}: {reason}; copy the encoder's folder again"
        ) from error


def is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer is a tokenizer.json that does not need transformers."""
    if not (folder / "tokenizer.json").is_file() or not (folder / "tokenizer_config.json").is_file():
        return False
    try:
        settings = read_json_file(folder / "tokenizer_config.json")
    except ValueError:
        return False  # transformers then raises an error that describes the problem
    return isinstance(settings, dict) and settings.get("tokenizer_class") in PLAIN_CLASSES
