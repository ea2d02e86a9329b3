"""An 8-bit text encoder has nearly the same output, in less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_if import make_if
from helpers_text import make_tiny_t5

from cascade import CascadePipeline
from cascade.errors import CascadeError
from cascade.text.t5 import TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


def test_embeddings_in_8_bits_are_almost_those_of_float32(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_tiny_t5(tmp_path / "t5", 64)
    prompts = ["a red apple", "two blue stars", ""]
    whole, eight = (TextEncoder.from_pretrained(folder, eight_bit=bits) for bits in (False, True))
    assert eight._loaded().encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.int8
    ours, theirs = eight.encode(prompts), whole.encode(prompts)
    assert torch.equal(ours.mask, theirs.mask)
    similarity = torch.nn.functional.cosine_similarity(ours.tokens.float(), theirs.tokens, dim=-1)[ours.mask]
    assert similarity.min() > 0.99
    assert eight.fingerprint != whole.fingerprint
    with pytest.raises(CascadeError, match="an 8-bit text encoder cannot be saved"):
        eight.save_pretrained(tmp_path / "saved")


def test_a_pipeline_draws_with_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_if(tmp_path / "if")
    pipeline = CascadePipeline.from_pretrained(tmp_path / "if", device="cpu", text_8bit=True, low_memory=True)
    assert pipeline("a red apple", seed=1, steps=1, output_type="pt").images.shape == (1, 3, 8, 8)
    assert pipeline("a red apple", seed=1, steps=1, output_type="pt").images.isfinite().all()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_t5(tmp_path / "t5")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(CascadeError, match=r"pip install 'cascade-diffusion\[quantized\]'"):
        TextEncoder.from_pretrained(folder, eight_bit=True)
