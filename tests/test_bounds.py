"""Unreasonable numbers are refused with a reason, before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import make_tiny_cascade
from helpers_training import micro_config

from cascade import CascadeError, CascadePipeline
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.settings import AtMost, override, parse

MANY = 10**30


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


def refused(tmp_path: Path, *assignments: str) -> str:
    """What is said of a training run with these settings."""
    data = micro_config(tmp_path / "run").model_dump(mode="json")
    with pytest.raises(CascadeError) as caught:
        parse(TrainConfig, override(data, assignments), "run.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("stage.schedule={kind: linear, steps: 100001}", "100,001 is more than 100,000, and a schedule stores numbers"),
        ("stage.schedule={kind: squared_cosine, steps: 1000000000}", "1,000,000,000 is more than 100,000"),
        ("stage.model.channels=[65537]", "65,537 is more than 65,536, several times the widest layer"),
        ("stage.model.blocks=[1001, 1]", "1,001 is more than 1,000, several times the deepest published network"),
        ("stage.model.middle_blocks=1001", "1,001 is more than 1,000"),
        ("stage.model.text_dim=65537", "65,537 is more than 65,536"),
        ("stage.resolution=65537", "65,537 is more than 65,536, the side of a picture that takes 13 GB by itself"),
        ("stage.sampling.steps=100001", "100,001 is more than 100,000, each of which calls the network"),
        ("stage.sampling.consistency=1001", "1,001 is more than 1,000, long after the picture stops changing"),
        ("text.max_length=32769", "32,769 is more than 32,768, and the memory of attention grows with its square"),
        ("data.workers=1025", "1,025 is more than 1,024, more than any machine has processors for"),
        ("training.batch_size=10000001", "10,000,001 is more than 10,000,000, which no memory holds at once"),
        ("training.sample_count=10000001", "10,000,001 is more than 10,000,000"),
        ("training.validation={sources: [{kind: scenes}], batches: 1000001}", "a validation on so many never ends"),
        (
            f"training.steps={2**53 + 1}",
            "9,007,199,254,740,993 is more than 9,007,199,254,740,992, above which floating-point numbers",
        ),
        (f"training.log_every={'9' * 4000}", "a number of many digits is more than 9,007,199,254,740,992"),
    ],
)
def test_a_setting_beyond_its_bound_is_refused_with_the_reason(tmp_path: Path, assignment: str, expected: str) -> None:
    message = refused(tmp_path, assignment)
    assert expected in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            {"channels": [65536, 65536], "blocks": [200, 100], "strides": [1, 2], "attention": [False, False]},
            "300 layers of up to 65,536 channels have more than 1,288,490,188,800 weights",
        ),
        (
            {"channels": [32, 32], "blocks": [600, 600], "strides": [1, 2], "attention": [False, False]},
            "1,200 is more than 1,000, several times the deepest published network",
        ),
        (
            {"kind": "transformer", "width": 65536, "depth": 1000},
            "1,000 layers of up to 65,536 channels have more than 4,294,967,296,000 weights",
        ),
    ],
)
def test_what_a_network_takes_is_counted_before_it_is_built(
    model: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda _module: pytest.fail("built"))
    with pytest.raises(CascadeError, match=expected):
        parse(StageConfig, {"name": "a", "resolution": 64, "model": model}, "stage.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_images_per_prompt": MANY}, "num_images_per_prompt: a number of many digits is more than 10,000,000"),
        ({"batch_size": 10_000_001}, "batch_size: 10,000,001 is more than 10,000,000"),
        ({"height": MANY}, "height: a number of many digits is more than 65,536"),
        ({"width": 65_568}, "width: 65,568 is more than 65,536"),
        ({"steps": MANY}, "steps: a number of many digits is more than 100,000"),
    ],
)
def test_an_argument_beyond_its_bound_is_refused_with_the_reason(
    pipeline: CascadePipeline, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CascadeError, match=expected):
        pipeline("a fox", **arguments)


def test_pictures_that_do_not_fit_into_memory_are_refused_before_the_first(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.drawing.arguments.free_bytes", lambda _device: 10 * 32 * 32 * 3)
    assert len(pipeline("a fox", num_images_per_prompt=10, seed=1, steps=1).images) == 10
    monkeypatch.setattr(CascadePipeline, "task", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(CascadeError, match=r"11 pictures of 32x32 take 0\.0 GB"):
        pipeline("a fox", num_images_per_prompt=11)


def test_a_bound_itself_is_allowed() -> None:
    bound = AtMost(7, "for a reason")
    assert bound(7) == 7
    with pytest.raises(ValueError, match=r"^8 is more than 7, for a reason$"):
        bound(8)
