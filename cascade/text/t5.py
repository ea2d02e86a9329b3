"""A frozen T5 encoder: prompts in, token embeddings and their mask out."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import Tensor

from cascade.conditioning import NullText, TextEmbeddings
from cascade.config.data import Captions, TextReading
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import atomic_folder
from cascade.files.paths import plain_path
from cascade.files.tensors import move_streamed
from cascade.system.transfer import on_device
from cascade.text.language import prepare_caption, well_formed
from cascade.text.t5_files import (
    call,
    check_folder,
    eight_bit_options,
    is_local,
    load_own_t5,
    load_t5,
    name_tokenizer_portably,
    quiet,
    streamed_t5,
    token_ids,
)

DTYPES = (torch.float32, torch.bfloat16)
MOST_WINDOWS = 32
"""Upper bound of the parts of a prompt that is read in windows."""


class Reading(TypedDict, total=False):
    """Optional arguments of `TextEncoder` on tokenization and padding."""

    max_length: int
    padded: bool
    captions: Captions
    null_text: NullText


class TextEncoder:
    """A frozen T5 encoder in evaluation mode.

    Source: Raffel et al. (2020), the encoder alone, as Imagen uses it (Saharia et al. 2022, section 2.1).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int = 64,
        padded: bool = False,
        captions: Captions = "as_is",
        null_text: NullText = "encoded",
    ) -> None:
        """model: a T5Encoder, or transformers' T5EncoderModel. tokenizer: the model's, which ends every text with </s>.

        padded: texts are padded to `max_length` before encoding, and the output for the padding is part of the
        embedding: for networks that were trained without a mask. captions: how texts are cleaned first. null_text: the
        embedding of an empty text.
        """
        if max_length < 1:
            raise CascadeError(f"max_length is {max_length}; use at least 1, for the end-of-text token")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._dim: int = model.config.d_model
        self._parameters_count: int = sum(parameter.numel() for parameter in model.parameters())
        self._max_length = max_length
        self.padded, self.captions, self.null_text = padded, captions, null_text
        self._fingerprint: str | None = None
        self._streamed_to: torch.device | None = None
        self.eight_bit = False

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        streamed: bool = False,
        eight_bit: bool = False,
        **reading: Unpack[Reading],
    ) -> Self:
        """Load a T5 from a folder in transformers' layout, or from a hub id such as google/flan-t5-base.

        The tokenizer is in the folder of the weights, or in a folder `tokenizer` next to it, as in diffusers' layout.
        A source that exists or looks like a path never causes a download. Weights are safetensors; nothing is
        unpickled. Raises CascadeError when there is no such folder or model, its files are damaged or
        incomplete, or it is not a T5. streamed: a folder's weights stay on disk and are read layer by layer.
        eight_bit: linear weights are int8 (bitsandbytes), a quarter of float32's memory; not with `streamed`.
        reading: max_length, padded, captions and null_text of the constructor.
        """
        _check_dtype(dtype)
        local = is_local(source)
        where = str(plain_path(source)) if local else str(source)
        if local:
            check_folder(Path(where))
        model, tokenizer = _load(where, local, device, dtype, streamed, eight_bit)
        encoder = cls(model, tokenizer, **reading)
        encoder.eight_bit = eight_bit
        if streamed and local:
            encoder._streamed_to = torch.device(device or "cpu")
            return encoder
        return encoder.to(device, dtype)

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._dim

    @property
    def max_length(self) -> int:
        """Tokens kept of a prompt, its </s> included."""
        return self._max_length

    @property
    def reading(self) -> TextReading:
        """The settings by which prompts become tokens."""
        return TextReading(
            max_length=self.max_length, padded=self.padded, captions=self.captions, null_text=self.null_text
        )

    @property
    def parameters_count(self) -> int:
        """Parameters of the encoder, the shared embedding counted once."""
        return self._parameters_count

    @property
    def device(self) -> torch.device:
        """Device of the weights and the embeddings."""
        device: torch.device = self._streamed_to or self._loaded().device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights and the embeddings."""
        dtype: torch.dtype = self._loaded().dtype
        return dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything an embedding depends on: weights, tokenizer, max_length and dtype.

        Computed on first use; equal in every process and on every device.
        """
        if self._fingerprint is None:
            ways = f" padded={self.padded} {self.captions}" if self.padded or self.captions != "as_is" else ""
            ways += " eight_bit" if self.eight_bit else ""
            ways += " null_text=zeros" if self.null_text == "zeros" else ""
            digest = hashlib.sha256(f"{self.max_length} {self.dtype}{ways}\n".encode())
            digest.update(_describe(self._tokenizer).encode())
            for name, parameter in sorted(self._loaded().named_parameters()):
                digest.update(f"\n{name} {list(parameter.shape)}\n".encode())
                digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:
        """The embeddings of `prompts`, one or more: (B, N, D) with N the longest, and their mask.

        The empty prompt is the null text, whose embedding follows `null_text`. The default is one prompt at a time: a
        matrix product may differ in its last bits between batch sizes, and an embedding should not depend on its batch.
        Equal prompts are encoded once. A prompt of more than `max_length` tokens is cut, with a warning.
        """
        assert not isinstance(prompts, str), "encode takes a list of prompts"
        prompts = [prepare_caption(prompt, self.captions) for prompt in prompts]
        distinct = list(dict.fromkeys(prompts))
        ids = {prompt: self._tokenize(prompt) for prompt in distinct}
        distinct.sort(key=lambda prompt: len(ids[prompt]))  # similar lengths together need less padding
        rows: dict[str, Tensor] = {}
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            rows.update(zip(batch, self._embed([ids[prompt] for prompt in batch]), strict=True))
        if self.null_text == "zeros":
            nothing = self._tokenize("")
            rows = {prompt: row * 0 if ids[prompt] == nothing else row for prompt, row in rows.items()}
        return TextEmbeddings.from_rows([rows[prompt] for prompt in prompts])

    def windows(self, prompt: str) -> list[str]:
        """The prompt in parts of at most `max_length` tokens each, </s> included, cut between words.

        A prompt within the limit is its only part. A single longer word is a part of its own, which `encode` cuts. Of a
        very long prompt the first `MOST_WINDOWS` parts remain, with a warning.
        """
        text = prepare_caption(prompt, self.captions)
        if self._count(text) < self.max_length:
            return [prompt]
        parts, used = [list[str]()], 0
        for word in text.split():
            count = self._count(word)
            if parts[-1] and used + count >= self.max_length:
                parts.append([])
                used = 0
            parts[-1].append(word)
            used += count
        windows = [" ".join(words) for words in parts]
        if len(windows) > MOST_WINDOWS:
            warnings.warn(
                f"the prompt {quoted(_shorten(prompt))} has {len(windows)} windows of {self.max_length} tokens:"
                f" the first {MOST_WINDOWS} are read",
                stacklevel=2,
            )
        return windows[:MOST_WINDOWS]

    def _count(self, text: str) -> int:
        """Number of tokens of a text that is not cut, without its </s>."""
        return len(token_ids(self._tokenizer, well_formed(text))) - 1

    def spans(self, prompt: str) -> tuple[str, list[tuple[int, int]]]:
        """The text that is read for a prompt, and the place of each of its tokens in it: (first letter, one past last).

        No tokens for a tokenizer that does not keep their places.
        """
        text = well_formed(prepare_caption(prompt, self.captions))
        try:
            found = call(self._tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
        except NotImplementedError:  # transformers' tokenizers in Python
            return text, []
        return text, [tuple(span) for span in found][: self.max_length]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the weights to `device`, cast them to `dtype`, and return this encoder; an 8-bit one is not moved."""
        if self.eight_bit:
            return self
        if dtype is not None and dtype != self.dtype:
            _check_dtype(dtype)
            self._fingerprint = None
        if self._streamed_to is None:
            self._loaded().to(device=device, dtype=dtype)
        else:
            move_streamed(self._loaded(), device, dtype)
            self._streamed_to = torch.device(device or self._streamed_to)
        return self

    def release(self) -> None:
        """Free the weights. Afterwards `dim` and an already computed fingerprint work, `encode` does not."""
        self._model = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer so that `from_pretrained(folder)` gives the same embeddings.

        Weights that bf16 represents exactly, such as those read from a bf16 file, are written as bf16. A text encoder
        in `folder` is replaced; raises CascadeError if the folder holds anything else.
        """
        if self.eight_bit:
            raise CascadeError(f"{folder}: an 8-bit text encoder cannot be saved; load it without eight_bit first")
        folder = plain_path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise CascadeError(f"{folder}: holds other files; name a new or empty folder for the text encoder")
        model = _halved(self._loaded())
        with atomic_folder(folder) as temporary, quiet(progress=False):
            model.save_pretrained(temporary)
            self._tokenizer.save_pretrained(temporary)
            name_tokenizer_portably(temporary)
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors writes files that only their owner may read

    def _loaded(self) -> Any:
        if self._model is None:
            raise CascadeError(
                "this text encoder was released to free its memory; load it again with TextEncoder.from_pretrained"
            )
        return self._model

    def _embed(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token ids -> embeddings, each (n, D): unpadded, or of length max_length where `padded`."""
        lengths = [len(row) for row in ids]
        longest = self.max_length if self.padded else max(lengths)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        inputs = {"input_ids": on_device(padded, self.device), "attention_mask": on_device(mask, self.device)}
        # Autocast is meant for the run's network. Training encodes text outside of it, and T5-XXL overflows float16.
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._loaded()(**inputs).last_hidden_state
        if self.padded:
            return list(hidden)
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def _tokenize(self, prompt: str) -> list[int]:
        """At most `max_length` token ids; a cut text still ends with </s>, as all of T5's training texts did."""
        ids: list[int] = token_ids(self._tokenizer, well_formed(prompt))
        if len(ids) <= self.max_length:
            return ids
        cut = self.max_length - 1
        warnings.warn(self._cut_message(prompt, len(ids), cut), stacklevel=2)
        return [*ids[:cut], ids[-1]]

    def _cut_message(self, prompt: str, count: int, cut: int) -> str:
        text = well_formed(prompt)
        spans = call(self._tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
        end = spans[cut - 1][1] if cut else 0
        kept, lost = text[:end], text[end:]
        return (
            f"the prompt {quoted(_shorten(prompt))} has {count} tokens, more than max_length {self.max_length}:"
            f" cut after {quoted(' '.join(kept.split()[-4:]))}, before {quoted(' '.join(lost.split()[:4]))}"
        )


def _load(
    where: str, local: bool, device: torch.device | str | None, dtype: torch.dtype, streamed: bool, eight_bit: bool
) -> tuple[Any, Any]:
    """Model and tokenizer, loaded by transformers only where necessary."""
    if local and not streamed and not eight_bit:
        own = load_own_t5(Path(where), dtype)
        if own is not None:
            return own
    with quiet(progress=not local):
        if streamed and local:
            return streamed_t5(Path(where), device or "cpu", dtype)
        return load_t5(where, local, dtype, eight_bit_options(device) if eight_bit else {})


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise CascadeError(
            f"text encoder: dtype {str(dtype).removeprefix('torch.')} is not supported; use float32 or bfloat16"
            " (T5's activations overflow float16)"
        )


def _halved(model: Any) -> Any:
    """A bf16 copy of the model if bf16 represents every weight exactly, else the model itself."""
    if all(torch.equal(weight, weight.bfloat16().to(weight.dtype)) for weight in model.parameters()):
        return copy.deepcopy(model).to(torch.bfloat16)
    return model


def _describe(tokenizer: Any) -> str:
    """Everything that decides a text's ids, as canonical JSON; truncation and padding are not used and left out."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
    backend["split_special_tokens"] = tokenizer.split_special_tokens
    return json.dumps(backend, sort_keys=True)


def _shorten(prompt: str, length: int = 40) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 1] + "…"


# --- words -----------------------------------------------------------------------------------------------------------
# The words of a prompt, and the token embeddings of each.


def words_of(encoder: TextEncoder, prompt: str) -> dict[str, list[int]]:
    """Each word, in order of the prompt -> the rows of its tokens in the embedding.

    A repeated word has the rows of all its occurrences. Words beyond the encoder's length are left out.
    """
    text, spans = encoder.spans(prompt)
    rows: dict[str, list[int]] = {}
    for match in re.finditer(r"[\w'-]+", text):
        own = [row for row, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
        if own:
            rows.setdefault(match.group(), []).extend(own)
    return rows
