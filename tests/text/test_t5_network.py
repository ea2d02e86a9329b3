"""The encoder without transformers: embeddings, ids and folders equal to transformers', bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_text import make_tiny_t5
from pydantic import ValidationError

from cascade.errors import CascadeError
from cascade.text.t5 import TextEncoder
from cascade.text.t5_files import load_own_t5, load_t5, quiet, token_ids
from cascade.text.t5_network import T5Encoder, T5Settings

BUNDLED = Path(__file__).parents[2] / "cascade" / "pretrained" / "text_encoder"
TEXTS = ["a red apple", "", "  Two\tBLUE stars\n", "🦊 苹果 é ﬁ", "</s> <pad> <extra_id_0>", "\x00\u200b", "a " * 200]


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(model, tokenizer) without transformers, and with it."""
    folder = BUNDLED if request.param == "bundled" else make_tiny_t5(tmp_path_factory.mktemp("t5"))
    own = load_own_t5(folder, torch.float32)
    assert own is not None, "a plain folder needs no transformers"
    with quiet(progress=False):
        return own, load_t5(str(folder), True, torch.float32, {})


@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_hidden_states_are_those_of_transformers_to_the_bit(proj: str, dtype: torch.dtype) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=60, d_model=24, d_kv=8, num_heads=3, d_ff=40, num_layers=3, feed_forward_proj=proj)
    theirs = T5EncoderModel(config).eval().to(dtype)
    ours = T5Encoder(T5Settings.model_validate(config.to_dict())).to(dtype)
    weights = theirs.state_dict()
    weights.pop("encoder.embed_tokens.weight", None)
    ours.load_state_dict(weights)
    for length, padding in ((1, 0), (9, 0), (9, 4), (300, 0)):  # 300: beyond the farthest distance told apart
        ids, mask = torch.randint(60, (2, length)), torch.ones(2, length, dtype=torch.bool)
        mask[1, length - padding :] = False
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(ours(ids, mask).last_hidden_state, expected)


def test_every_text_has_the_ids_and_places_of_transformers(both: tuple[Any, Any]) -> None:
    (_, own), (_, theirs) = both
    rng = random.Random(0)
    texts = [*TEXTS, *("".join(chr(rng.randrange(0x20, 0xD7FF)) for _ in range(12)) for _ in range(100))]
    options = {"verbose": False, "return_offsets_mapping": True}
    for text in texts:
        expected = theirs(text, **options)
        assert own(text, **options) == {name: expected[name] for name in ("input_ids", "offset_mapping")}, text
    assert own(texts)["input_ids"] == theirs(texts, verbose=False)["input_ids"]
    assert (len(own), own.eos_token_id) == (len(theirs), theirs.eos_token_id)


def test_embeddings_and_fingerprint_are_those_of_transformers(both: tuple[Any, Any]) -> None:
    own, theirs = (TextEncoder(*pair, max_length=300) for pair in both)
    assert isinstance(own._model, T5Encoder)
    assert torch.equal(own.encode(TEXTS).tokens, theirs.encode(TEXTS).tokens)
    assert own.fingerprint == theirs.fingerprint
    assert own.parameters_count == theirs.parameters_count


def test_what_is_saved_loads_in_transformers_with_the_same_embeddings(both: tuple[Any, Any], tmp_path: Path) -> None:
    own = TextEncoder(*both[0], max_length=300)
    own.save_pretrained(tmp_path / "t5")
    with quiet(progress=False):
        theirs = TextEncoder(*load_t5(str(tmp_path / "t5"), True, torch.float32, {}), max_length=300)
    assert torch.equal(own.encode(TEXTS).tokens, theirs.encode(TEXTS).tokens)
    assert own.fingerprint == theirs.fingerprint


@pytest.mark.parametrize(
    "change", [{"feed_forward_proj": "gated-silu"}, {"relative_attention_num_buckets": 64}, {"model_type": "umt5"}]
)
def test_a_kind_that_is_not_known_here_is_left_to_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = make_tiny_t5(tmp_path / "t5")
    settings = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(ValidationError):
        T5Settings.model_validate(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_own_t5(folder, torch.float32) is None


def test_a_tokenizer_that_transformers_changes_is_left_to_it(tmp_path: Path) -> None:
    folder = make_tiny_t5(tmp_path / "t5")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "T5Tokenizer"}))
    assert load_own_t5(folder, torch.float32) is None


def test_drawing_with_the_bundled_encoder_imports_no_transformers() -> None:
    program = (
        "import sys\nfrom cascade import CascadePipeline\n"
        "CascadePipeline.from_pretrained()('a red apple', seed=0, until=64, steps=1)\n"
        "print(sorted({'transformers', 'accelerate', 'datasets', 'diffusers', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class PanicException(BaseException):
    """What pyo3 raises for a panic of Rust: no `Exception`."""


def test_a_panic_of_the_tokenizer_is_one_line_with_the_text() -> None:
    def panics(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    with pytest.raises(CascadeError, match=r"tokenizer\.json fails on 'a fox': index out of bounds; copy") as caught:
        token_ids(panics, "a fox")
    assert "\n" not in str(caught.value)


def test_an_interrupt_of_the_tokenizer_stays_an_interrupt() -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_ids(interrupted, "a fox")
