"""Arguments are checked before anything changes: an error is one line, and the pipeline draws as before."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError, CascadePipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def drawn(pipeline: CascadePipeline, **options: Any) -> bytes:
    return bytes(pipeline("a fox", until=8, **{"seed": 3, **options}).images[0].tobytes())


def cut_off() -> Image.Image:
    """A picture whose file ends too early, which is known once its pixels are asked for."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:500]))


def closed() -> Image.Image:
    image = cut_off()
    image.close()
    return image


SMALL = Image.new("RGB", (8, 8))
WRONG: dict[str, tuple[Callable[[CascadePipeline], object], str]] = {
    "a GPU that is not there": (lambda p: p.to("cuda:99"), "device: cuda:99 cannot be used here"),
    "no device": (lambda p: p.to("nowhere"), "device: nowhere cannot be used here"),
    "a device without numbers": (lambda p: p.to("meta"), "device: meta cannot be used here"),
    "no number format": (lambda p: p.to(dtype="a"), "dtype: 'a'; expected one of float32, bfloat16, float16, auto"),
    "a format for GPUs": (lambda p: p.to(dtype=torch.float16), "dtype: float16 needs a GPU; on a CPU use bfloat16"),
    "a picture cut off": (lambda p: p.upscale(cut_off()), "image: not a readable picture: image file is truncated"),
    "a closed picture": (lambda p: p.upscale(closed()), "image: not a readable picture: "),
    "a picture without pixels": (
        lambda p: p.upscale(Image.new("RGB", (0, 3))),
        "image: a picture of 0x3 has no",
    ),
    "two prompts for a picture": (lambda p: p.upscale(SMALL, prompt=["a", "b"]), "prompt: 2 texts; expected one"),
    "width 0": (lambda p: p("a", width=0), "width: 0 is not possible; expected a multiple of"),
    "several sizes": (lambda p: p("a", until=np.array([8, 16])), "until: array([ 8, 16]); expected a whole number"),
    "seeds in two dimensions": (
        lambda p: p("a", seed=np.zeros((1, 1), int)),
        "seed: array([0]); expected a whole",
    ),
    "a row of steps": (lambda p: p("a", steps=np.array([1, 2])), "stage base: Object of type ndarray"),
    "prompts by name": (lambda p: p({"a": 1}), "prompt: {'a': 1} is not text"),
    "bytes": (lambda p: p(b"a fox"), "prompt: b'a fox' is not text"),
    "a callback that is none": (lambda p: p("a", callback=3), "callback: 3; expected a function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line_and_changes_nothing(pipeline: CascadePipeline, name: str) -> None:
    call, message = WRONG[name]
    before = drawn(pipeline)
    with pytest.raises(CascadeError) as raised:
        call(pipeline)
    assert str(raised.value).startswith(message)
    assert len(str(raised.value).splitlines()) == 1
    assert drawn(pipeline) == before


def test_numbers_of_numpy_and_torch_are_numbers(pipeline: CascadePipeline) -> None:
    expected = drawn(pipeline, seed=3, steps=1, guidance=2.0)
    for seed in (np.array(3), np.int64(3), torch.tensor(3), [np.array(3)], np.array([3])):
        assert drawn(pipeline, seed=seed, steps=np.array(1), guidance=torch.tensor(2.0)) == expected


def test_a_number_format_may_be_named(model: Path) -> None:
    named = CascadePipeline.from_pretrained(model, device="cpu").to(dtype="bfloat16")
    assert named.dtype == torch.bfloat16
    assert drawn(named) == drawn(CascadePipeline.from_pretrained(model, device="cpu").to(dtype=torch.bfloat16))
    assert drawn(named.to("cpu", "float32").to(dtype=torch.bfloat16)) == drawn(named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "upper"}, "captions: 'upper'; expected"),
        ({"super_resolution": 3}, "super_resolution: 3;"),
    ],
)
def test_wrong_ways_to_load_are_named(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        CascadePipeline.from_pretrained(model, device="cpu", **options)
