"""One of several precisions of weights is read, in every folder layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade.storage.convert import _needed
from cascade.storage.diffusers import weight_files
from cascade.text.t5_files import text_weights

FULL, BF16, FP16 = "model.safetensors", "model.bf16.safetensors", "model.fp16.safetensors"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [([FULL, BF16, FP16], FULL), ([BF16, FP16], BF16), ([FP16], FP16), ([FULL, BF16], FULL), ([BF16], BF16)],
)
def test_full_precision_goes_before_half_and_bfloat16_before_float16(
    tmp_path: Path, names: list[str], chosen: str
) -> None:
    (tmp_path / "unet").mkdir()
    for name in (*names, "config.json", "model.safetensors.index.fp16.json"):
        (tmp_path / name).touch()
        (tmp_path / "unet" / name.replace("model", "diffusion_pytorch_model")).touch()
    assert text_weights(tmp_path) == [tmp_path / chosen]
    assert weight_files(tmp_path) == [tmp_path / "unet" / chosen.replace("model", "diffusion_pytorch_model")]
    index = ["model.safetensors.index.fp16.json"] if chosen == FP16 else []
    assert [file.name for file in _needed(tmp_path)] == ["config.json", *index, chosen]
