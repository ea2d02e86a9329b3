"""Loading a T5's model and tokenizer from a folder or hub id; every failure becomes a one-line error."""

from __future__ import annotations

import importlib.util
import json
import logging as python_logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cascade.conditioning import NULL_TEXT
from cascade.config.data import Captions
from cascade.errors import CascadeError, quoted
from cascade.files.atomic import write_text
from cascade.files.paths import one_variant, path_of, variant_of
from cascade.files.tensors import stream
from cascade.files.text import read_json_file
from cascade.text.language import prepare_caption, well_formed
from cascade.text.t5_network import T5Encoder, T5Settings

# --- tokenizer -------------------------------------------------------------------------------------------------------
# A tokenizer.json read by the library `tokenizers`: the same ids as transformers', without importing it.

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


# --- t5 files --------------------------------------------------------------------------------------------------------

ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""The second name of the embedding in files, and the first."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_local(source: str | Path) -> bool:
    """Whether `source` is a folder: a Path, or text that exists as a path or cannot be a hub id ([owner/]name)."""
    return isinstance(source, Path) or _HUB_ID.fullmatch(source) is None or Path(source).exists()


def check_folder(folder: Path) -> None:
    """Raise CascadeError that names a missing file; transformers would invent an empty tokenizer."""
    if not folder.is_dir():
        raise CascadeError(
            f"{folder}: no such folder; a text encoder is a folder with config.json, model.safetensors and"
            " tokenizer.json, or a hub id such as google/flan-t5-base"
        )
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise CascadeError(f"{path}: no file, but a pipe, a device or a link that leads nowhere; copy it again")
    if not _has_tokenizer(tokenizer_folder(folder)):
        raise CascadeError(f"{folder}: no tokenizer.json; copy the tokenizer's files into this folder")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "spiece.model"))


def tokenizer_folder(folder: Path) -> Path:
    """The folder of a text encoder's tokenizer: the same folder, or the one next to it in diffusers' layout."""
    beside = folder.parent / "tokenizer"
    return folder if _has_tokenizer(folder) or not beside.is_dir() else beside


def name_tokenizer_portably(folder: Path) -> None:
    """Replace a saved tokenizer's class name by one that every release of transformers reads; 5.x's is internal."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def text_weights(folder: Path) -> list[Path]:
    """The safetensors files of a text encoder, in full precision if available."""
    files = sorted(folder.glob("*.safetensors"))
    return one_variant(files)


def _variant(folder: Path) -> str | None:
    """`bf16` or `fp16` when the folder holds no weights in full precision."""
    files = text_weights(folder)
    return variant_of(files[0]) if files else None


def load_own_t5(folder: Path, dtype: torch.dtype) -> tuple[T5Encoder, Tokenizer] | None:
    """Model and tokenizer of a checked folder, without transformers; None for a model that `T5Encoder` lacks.

    Raises CascadeError as `load_t5` does.
    """
    words, config = tokenizer_folder(folder), folder / "config.json"
    if not is_plain(words) or not text_weights(folder) or not config.is_file():
        return None
    try:
        settings = T5Settings.model_validate(read_json_file(config))
    except ValueError:
        return None
    with _errors_in_one_line(str(folder), local=True):
        tokenizer = Tokenizer(words)
        _check_tokenizer(str(folder), tokenizer, settings.vocab_size)
        with torch.device("meta"):
            model = T5Encoder(settings)
        found = _read_weights(text_weights(folder), model.state_dict().keys(), dtype)
        absent = sorted(model.state_dict().keys() - found.keys())
        if absent:
            raise CascadeError(f"{folder}: the weights lack {absent[0]}; copy or convert the model again")
        model.load_state_dict(found, assign=True)
    return model.requires_grad_(False), tokenizer


def _read_weights(files: Sequence[Path], names: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The encoder's tensors in the files, without a decoder's."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (the file is no mapping)
                name = ALIASES.get(key, key)
                if name in names and name not in found:
                    found[name] = stored.get_tensor(key).to(dtype)
    return found


def load_t5(where: str, local: bool, dtype: torch.dtype, quantized: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of a checked folder or a hub id. Raises CascadeError for any error of the libraries."""
    from transformers import T5EncoderModel

    with _errors_in_one_line(where, local):
        config, tokenizer = _config_and_tokenizer(where, local)
        model, loaded = T5EncoderModel.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            variant=_variant(Path(where)) if local else None,
            output_loading_info=True,
            local_files_only=local,
            trust_remote_code=False,
            **quantized,
        )
    if loaded["missing_keys"]:
        raise CascadeError(f"{where}: the weights lack {min(loaded['missing_keys'])}; copy or convert the model again")
    return model, tokenizer


def streamed_t5(folder: Path, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of a checked folder, with the weights on disk: hooks fetch those of the layer that runs."""
    from transformers import T5EncoderModel

    with _errors_in_one_line(str(folder), local=True):
        config, tokenizer = _config_and_tokenizer(str(folder), local=True)
        with torch.device("meta"):
            model = T5EncoderModel(config).to(dtype).eval().requires_grad_(False)
        stream(model, text_weights(folder), device, ALIASES, whole=False)  # some files also hold a decoder
    return model, tokenizer


def _config_and_tokenizer(where: str, local: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    options = {"local_files_only": local, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(where, **options)
    if config.model_type != "t5":
        raise CascadeError(f"{where}: holds a {config.model_type}, not a T5; name the folder or hub id of a T5")
    if getattr(config, "quantization_config", None) is not None:
        raise CascadeError(
            f"{where}: config.json: quantization_config: weights that are stored quantized are not read; give those in"
            " full or half precision, and eight_bit for less memory"
        )
    words = str(tokenizer_folder(Path(where))) if local else where
    tokenizer = AutoTokenizer.from_pretrained(words, **options)
    _check_tokenizer(where, tokenizer, config.vocab_size)
    return config, tokenizer


@contextmanager
def _errors_in_one_line(where: str, local: bool) -> Iterator[None]:
    """Turn any error into a one-line CascadeError: damaged files raise OSError, ValueError, TypeError and more."""
    try:
        yield
    except (CascadeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the tokenizers, written in Rust, panic past every `except Exception`
        reason = str(error).strip().splitlines() or [type(error).__name__]
        way_out = "copy the folder again" if local else "check the name and the network, or name a local folder"
        raise CascadeError(
            f"{where}: not a loadable T5 text encoder with safetensors weights: {reason[0].rstrip('.')}; {way_out}"
        ) from error


def eight_bit_options(device: torch.device | str | None) -> dict[str, Any]:
    """Arguments that load int8 weights. Raises CascadeError when the library for it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CascadeError(
            "text encoder: 8 bits need bitsandbytes; pip install 'cascade-diffusion[quantized]', or leave eight_bit out"
        )
    from transformers import BitsAndBytesConfig

    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)  # it reports every cast
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": str(device or "cpu")}}


def _check_tokenizer(where: str, tokenizer: Any, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise CascadeError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}; they belong to"
            " different models"
        )
    if tokenizer(NULL_TEXT)["input_ids"] != [tokenizer.eos_token_id]:
        raise CascadeError(f"{where}: the tokenizer does not end a text with </s>; use the tokenizer of the T5")


@contextmanager
def quiet(*, progress: bool) -> Iterator[None]:
    """Silence transformers' reports, since CascadeError replaces them; and its progress bars, except for a download."""
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


# --- tokens ----------------------------------------------------------------------------------------------------------
# Lengths of captions in tokens, without the weights of the encoder.


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
