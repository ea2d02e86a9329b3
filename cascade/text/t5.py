"""A frozen T5 encoder: prompts in, token embeddings and their mask out."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging as python_logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from cascade.checkpoint import atomic_folder
from cascade.conditioning import NULL_TEXT, pad_text
from cascade.errors import CascadeError
from cascade.streaming import move_streamed, stream
from cascade.text.captions import Captions, prepare_caption

DTYPES = (torch.float32, torch.bfloat16)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class TextEmbeddings:
    """The embeddings of B prompts.

    tokens: (B, N, D), zero where padded. mask: (B, N) bool, True where a token is real; padding comes last.
    """

    tokens: Tensor
    mask: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor]) -> Self:
        """Pad unpadded embeddings, each (n, D), to the longest: (B, N, D)."""
        assert rows, "no embeddings to pad"
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return cls(tokens, mask)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self) -> list[Tensor]:
        """Each prompt's embedding without padding: (n, D)."""
        lengths = self.mask.sum(dim=1).tolist()
        return [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    def select(self, indices: Sequence[int]) -> TextEmbeddings:
        """The prompts at `indices`, in that order and as often as named; the padded length stays."""
        chosen = torch.as_tensor(indices, dtype=torch.long, device=self.tokens.device)
        return TextEmbeddings(self.tokens[chosen], self.mask[chosen])

    def padded(self, length: int) -> TextEmbeddings:
        """The same embeddings with masked zeros up to `length` tokens; `length` is at least N."""
        assert length >= self.tokens.shape[1], f"{self.tokens.shape[1]} tokens do not fit into {length}"
        return TextEmbeddings(*pad_text(self.tokens, self.mask, length))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """Move to `device`, and cast the tokens to `dtype`."""
        return TextEmbeddings(self.tokens.to(device=device, dtype=dtype), self.mask.to(device=device))


def join(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """One batch of several; the shorter ones are padded with masked zeros."""
    longest = max(part.tokens.shape[1] for part in parts)
    padded = [part.padded(longest) for part in parts]
    return TextEmbeddings(torch.cat([part.tokens for part in padded]), torch.cat([part.mask for part in padded]))


class TextEncoderProtocol(Protocol):
    """Whatever turns prompts into embeddings: a `TextEncoder`, or one with a cache before it."""

    @property
    def dim(self) -> int:
        """Width D of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the embeddings would."""

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:
        """The embeddings of `prompts`, in their order."""

    def to(self, device: torch.device | str | None = None) -> Self:
        """Move to `device`, where the prompts are read from then on, and return this encoder."""

    def release(self) -> None:
        """Free the memory of the weights."""


class TextEncoder:
    """A T5 encoder in evaluation mode whose weights never train.

    Source: Raffel et al. (2020), the encoder alone, as Imagen uses it (Saharia et al. 2022, section 2.1).
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int = 64, padded: bool = False, captions: Captions = "as_is"
    ) -> None:
        """model: transformers' T5EncoderModel. tokenizer: its own, which ends every text with </s>.

        padded: texts are padded to `max_length` before the encoder, and what it gives for the padding belongs to the
        embedding: for networks that were trained so, without a mask. captions: how texts are cleaned before.
        """
        if max_length < 1:
            raise CascadeError(f"max_length is {max_length}; at least 1 token, the end of the text, is needed")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._dim: int = model.config.d_model
        self._parameters_count: int = sum(parameter.numel() for parameter in model.parameters())
        self._max_length = max_length
        self.padded, self.captions = padded, captions
        self._fingerprint: str | None = None
        self._streamed_to: torch.device | None = None
        self.eight_bit = False

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        max_length: int = 64,
        padded: bool = False,
        captions: Captions = "as_is",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        streamed: bool = False,
        eight_bit: bool = False,
    ) -> Self:
        """Load a T5 from a folder in transformers' layout, or from a hub id such as google/flan-t5-base.

        The tokenizer may lie beside the weights or in a folder `tokenizer` beside theirs, as diffusers puts it.
        Whatever exists or looks like a path never goes to the network. Weights are safetensors, nothing is
        unpickled. Raises CascadeError when there is no such folder or model, its files are damaged or
        incomplete, or it is no T5. streamed: a folder's weights stay on disk and are read layer by layer.
        eight_bit: linear weights are int8 (bitsandbytes), a quarter of float32's memory; not with `streamed`.
        """
        _check_dtype(dtype)
        local = is_local(source)
        where = str(Path(source).expanduser()) if local else str(source)
        if local:
            check_folder(Path(where))
        with _quiet(progress=not local):
            if streamed and local:
                return cls._streaming(Path(where), device or "cpu", dtype, max_length, padded, captions)
            quantized = _eight_bit(device) if eight_bit else {}
            model, tokenizer = _load(where, local, dtype, quantized)
        encoder = cls(model, tokenizer, max_length, padded, captions)
        encoder.eight_bit = eight_bit
        return encoder if eight_bit else encoder.to(device, dtype)

    @classmethod
    def _streaming(cls, folder: Path, device: torch.device | str, dtype: torch.dtype, *how: Any) -> Self:
        """See `from_pretrained`: the model on the meta device, with hooks that fetch what runs."""
        from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder), local_files_only=True)
        with torch.device("meta"):
            model = T5EncoderModel(config).to(dtype).eval().requires_grad_(False)
        aliases = {"encoder.embed_tokens.weight": "shared.weight"}
        stream(model, text_weights(folder), device, aliases, whole=False)  # some files hold a decoder, too
        encoder = cls(model, tokenizer, *how)
        encoder._streamed_to = torch.device(device)
        return encoder

    @property
    def dim(self) -> int:
        """Width D of an embedding."""
        return self._dim

    @property
    def max_length(self) -> int:
        """Tokens kept of a prompt, its </s> included."""
        return self._max_length

    @property
    def parameters_count(self) -> int:
        """Parameters of the encoder, the shared embedding counted once."""
        return self._parameters_count

    @property
    def device(self) -> torch.device:
        """Where the weights and the embeddings are."""
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

        Computed when first asked for; the same in every process and on every device.
        """
        if self._fingerprint is None:
            ways = f" padded={self.padded} {self.captions}" if self.padded or self.captions != "as_is" else ""
            ways += " eight_bit" if self.eight_bit else ""
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

        The empty prompt is the null text. One prompt at a time by default: a matrix product may differ in its
        last bits between batch sizes, and an embedding should not depend on its neighbours. Equal prompts are
        encoded once. A prompt of more than `max_length` tokens is cut, with a warning that says where.
        """
        assert not isinstance(prompts, str), "encode takes a list of prompts"
        prompts = [prepare_caption(prompt, self.captions) for prompt in prompts]
        distinct = list(dict.fromkeys(prompts))
        ids = {prompt: self._tokenize(prompt) for prompt in distinct}
        distinct.sort(key=lambda prompt: len(ids[prompt]))  # like lengths together: less padding in a batch
        rows: dict[str, Tensor] = {}
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            rows.update(zip(batch, self._embed([ids[prompt] for prompt in batch]), strict=True))
        return TextEmbeddings.from_rows([rows[prompt] for prompt in prompts])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the weights to `device`, cast them to `dtype`, and return this encoder; one in 8 bits stays."""
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
        """Free the weights; `dim` and a fingerprint that was asked for before remain, `encode` does not."""
        self._model = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer so that `from_pretrained(folder)` gives the same embeddings.

        Weights that bf16 holds exactly, such as those that came from a bf16 file, are written as bf16. A text
        encoder that stood in `folder` is replaced; raises CascadeError if anything else stands there.
        """
        if self.eight_bit:
            raise CascadeError(f"{folder}: a text encoder in 8 bits is not written; load it without eight_bit first")
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise CascadeError(f"{folder}: holds other files; name a new or empty folder for the text encoder")
        model = _halved(self._loaded())
        with atomic_folder(folder) as temporary, _quiet(progress=False):
            model.save_pretrained(temporary)
            self._tokenizer.save_pretrained(temporary)
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors writes what only its owner may read

    def _loaded(self) -> Any:
        if self._model is None:
            raise CascadeError(
                "this text encoder was released to free its memory; load it again with TextEncoder.from_pretrained"
            )
        return self._model

    def _embed(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token ids -> embeddings, each (n, D): unpadded, or all of max_length where `padded`."""
        lengths = [len(row) for row in ids]
        longest = self.max_length if self.padded else max(lengths)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.device)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        hidden = self._loaded()(input_ids=padded, attention_mask=mask.to(self.device)).last_hidden_state
        if self.padded:
            return list(hidden)
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def _tokenize(self, prompt: str) -> list[int]:
        """At most `max_length` token ids; a text that is cut still ends with </s>, as every text T5 saw."""
        ids: list[int] = self._tokenizer(well_formed(prompt), verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return ids
        cut = self.max_length - 1
        warnings.warn(self._cut_message(prompt, len(ids), cut), stacklevel=2)
        return [*ids[:cut], ids[-1]]

    def _cut_message(self, prompt: str, count: int, cut: int) -> str:
        text = well_formed(prompt)
        spans = self._tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
        end = spans[cut - 1][1] if cut else 0
        kept, lost = text[:end], text[end:]
        return (
            f"the prompt {_shorten(prompt)!r} has {count} tokens, more than max_length {self.max_length}:"
            f" it was cut after {' '.join(kept.split()[-4:])!r}, before {' '.join(lost.split()[:4])!r}"
        )


def well_formed(text: str) -> str:
    """`text` as valid Unicode: halves of a surrogate pair join, a lone one (no character) becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_local(source: str | Path) -> bool:
    """Whether `source` means a folder: a Path, or text that exists or cannot be a hub id ([owner/]name)."""
    return isinstance(source, Path) or _HUB_ID.fullmatch(source) is None or Path(source).exists()


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise CascadeError(
            f"text encoder: dtype {str(dtype).removeprefix('torch.')} is not offered; use float32 or bfloat16"
            " (T5's activations overflow float16)"
        )


def check_folder(folder: Path) -> None:
    """Missing files by name. transformers would make up an empty tokenizer in place of a missing one."""
    if not folder.is_dir():
        raise CascadeError(
            f"{folder}: no such folder; a text encoder is a folder with config.json, model.safetensors and"
            " tokenizer.json, or a hub id such as google/flan-t5-base"
        )
    if not _has_tokenizer(tokenizer_folder(folder)):
        raise CascadeError(f"{folder}: there is no tokenizer.json; copy the tokenizer's files beside the weights")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "spiece.model"))


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a text encoder's folder is: in it, or beside it as in diffusers' layout."""
    beside = folder.parent / "tokenizer"
    return folder if _has_tokenizer(folder) or not beside.is_dir() else beside


def text_weights(folder: Path) -> list[Path]:
    """The safetensors files of a text encoder: full precision where there is any."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16" not in file.name] or files


def _variant(folder: Path) -> str | None:
    """`fp16` when the folder holds weights of that variant alone."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _load(where: str, local: bool, dtype: torch.dtype, quantized: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of a checked folder or a hub id. Whatever the libraries raise becomes one line."""
    from transformers import AutoConfig, AutoTokenizer, T5EncoderModel

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(where, **options)
        if config.model_type != "t5":
            raise CascadeError(f"{where}: is a {config.model_type}, not a T5; give the folder or hub id of a T5")
        words = str(tokenizer_folder(Path(where))) if local else where
        tokenizer = AutoTokenizer.from_pretrained(words, **options)
        model, loaded = T5EncoderModel.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            variant=_variant(Path(where)) if local else None,
            output_loading_info=True,
            **quantized,
            **options,
        )
    except CascadeError:
        raise
    except Exception as error:  # damaged files raise OSError, ValueError, TypeError, SafetensorError, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        way_out = "copy the folder again" if local else "check the name and the network, or give a local folder"
        raise CascadeError(
            f"{where}: not loadable as a T5 text encoder with safetensors weights: {reason[0].rstrip('.')}; {way_out}"
        ) from error
    if loaded["missing_keys"]:
        raise CascadeError(f"{where}: the weights lack {min(loaded['missing_keys'])}; copy or convert the model again")
    _check_tokenizer(where, tokenizer, config.vocab_size)
    return model, tokenizer


def _eight_bit(device: torch.device | str | None) -> dict[str, Any]:
    """Arguments that load int8 weights. Raises CascadeError when the library for it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CascadeError(
            "text encoder: 8 bits need bitsandbytes; pip install 'cascade-diffusion[quantized]', or leave eight_bit out"
        )
    from transformers import BitsAndBytesConfig

    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # it tells of every cast
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": str(device or "cpu")}}


def _check_tokenizer(where: str, tokenizer: Any, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise CascadeError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}; they belong to"
            " different models"
        )
    if tokenizer(NULL_TEXT)["input_ids"] != [tokenizer.eos_token_id]:
        raise CascadeError(f"{where}: the tokenizer does not end a text with </s>; use the one T5 was trained with")


def _halved(model: Any) -> Any:
    """A bf16 copy of the model if no weight changes by it, else the model itself."""
    if all(torch.equal(weight, weight.bfloat16().to(weight.dtype)) for weight in model.parameters()):
        return copy.deepcopy(model).to(torch.bfloat16)
    return model


def _describe(tokenizer: Any) -> str:
    """All that decides a text's ids, as canonical JSON; without truncation and padding, unused here."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = {name: part for name, part in backend.items() if name not in ("truncation", "padding")}
    backend["split_special_tokens"] = tokenizer.split_special_tokens
    return json.dumps(backend, sort_keys=True)


def _shorten(prompt: str, length: int = 40) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 1] + "…"


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """transformers' reports off, since our errors say what is wrong; its bars too, unless for a download."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
