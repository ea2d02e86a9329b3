"""The text encoder in the package: T5's layout, small, and able to tokenize any text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.storage.index import BUNDLED

FOLDER = BUNDLED / "text_encoder"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def test_transformers_loads_it_as_an_encoder_of_at_most_six_million_parameters() -> None:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(FOLDER)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    assert model.config.is_gated_act
    assert model.config.dense_act_fn == "gelu_new"
    assert model.encoder.block[0].layer[0].SelfAttention.has_relative_attention_bias


def test_its_tokenizer_has_a_name_that_every_release_of_transformers_reads() -> None:
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("text", ["naïve café", "猫", "🦊", "\x00\x7f", "zzxqj", "<unk>", "Ω≈ç√", "\u202e"])
def test_rare_texts_are_spelled_in_bytes(tokenizer: Any, text: str) -> None:
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_gives_unknown_tokens(tokenizer: Any, text: str) -> None:
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
