"""Lengths of captions in tokens, without the weights of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.config.data import Captions
from cascade.errors import CascadeError
from cascade.files.paths import path_of
from cascade.text.captions import prepare_caption, well_formed
from cascade.text.t5_files import check_folder, is_local, tokenizer_folder
from cascade.text.tokenizer import Tokenizer, is_plain, token_ids


class TokenCounter:
    """Counts the tokens of a text as the encoder would read them, before truncation."""

    def __init__(self, source: str | Path, captions: Captions = "as_is") -> None:
        """source: folder or hub id of the encoder. captions: how texts are cleaned first.

        Raises CascadeError when there is no such folder or tokenizer.
        """
        local = is_local(source)
        if local:
            check_folder(path_of(source))
            source = tokenizer_folder(path_of(source))
        try:
            self._tokenizer = _load(source, local)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # damaged files raise nearly everything, panics of Rust too
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CascadeError(f"{source}: its tokenizer cannot be loaded: {reason}") from error
        self._captions: Captions = captions

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, its </s> included."""
        if not texts:
            return []
        prepared = [well_formed(prepare_caption(text, self._captions)) for text in texts]
        return [len(ids) for ids in token_ids(self._tokenizer, prepared)]


def _load(source: str | Path, local: bool) -> Any:
    """The tokenizer, loaded by transformers only where necessary."""
    if local and is_plain(path_of(source)):
        return Tokenizer(path_of(source))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source), local_files_only=local)
