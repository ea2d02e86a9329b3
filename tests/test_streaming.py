"""Weights that do not fit into memory are read layer by layer, with the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_if import make_if
from helpers_model import make_tiny_cascade
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade import CascadePipeline
from cascade.errors import CascadeError
from cascade.files.tensors import is_streamed, move_streamed, stored_bytes, stream

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(count)))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, streamed = layers(5), layers(5).to("meta")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    stream(streamed, [tmp_path / "model.safetensors"], "cpu")
    held: list[int] = []
    plain = nn.functional.linear

    def counting(*arguments: Any) -> Tensor:
        held.append(sum(not parameter.is_meta for parameter in streamed.parameters()))
        return plain(*arguments)

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = whole(x)
    monkeypatch.setattr(nn.functional, "linear", counting)
    assert torch.equal(streamed(x), expected)
    assert held == [1] * 5
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert stored_bytes([tmp_path / "model.safetensors"], torch.bfloat16) == 5 * 64 * 2


def test_a_missing_unknown_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(layers(2).state_dict(), path)
    with pytest.raises(CascadeError, match=r"2\.weight is missing"):
        stream(layers(3).to("meta"), [path], "cpu")
    with pytest.raises(CascadeError, match=r"1\.weight is not in this network"):
        stream(layers(1).to("meta"), [path], "cpu")
    with pytest.raises(CascadeError, match=r"0\.weight has shape \[8, 8\], this network has \[4, 8\]"):
        stream(nn.Sequential(nn.Linear(8, 4, bias=False)).to("meta"), [path], "cpu")


def test_a_damaged_text_encoder_that_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_cascade(tmp_path / "model")
    (tmp_path / "model" / "text_encoder" / "config.json").write_text("{")
    monkeypatch.setattr("cascade.system.device.free_bytes", lambda _device=None: 1000)
    with pytest.raises(CascadeError, match=r"text_encoder: not a loadable T5 .*; copy the folder again"):
        CascadePipeline.from_pretrained(tmp_path / "model", device="cpu", low_memory=True)


def test_what_is_streamed_can_still_change_its_device_and_number_format(tmp_path: Path) -> None:
    save_file(layers(2).state_dict(), tmp_path / "model.safetensors")
    module = layers(2).to("meta")
    assert not is_streamed(module)
    stream(module, [tmp_path / "model.safetensors"], "cpu")
    assert is_streamed(module)
    x = torch.randn(3, 8)
    move_streamed(module, dtype=torch.bfloat16)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    move_streamed(module, "meta", torch.float32)
    assert module(x).device.type == "meta"


@pytest.mark.parametrize("kind", ["ours", "deepfloyd", "sharded"])
def test_a_cascade_that_does_not_fit_draws_the_same_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "ours":
        make_tiny_cascade(tmp_path / "model")
    else:
        make_if(tmp_path / "model", **({"max_shard_size": "100KB"} if kind == "sharded" else {}))
    call: dict[str, Any] = {"prompt": "a red apple", "seed": 1, "steps": 1, "output_type": "pt"}
    expected = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu", low_memory=True)(**call).images
    monkeypatch.setattr("cascade.system.device.free_bytes", lambda _device=None: 1000)
    pipeline = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu", low_memory=True)
    for slot in pipeline.slots:
        assert all(parameter.is_meta for parameter in slot.load().network.parameters())
    assert pipeline.text_encoder._loaded().device.type == "meta"
    assert torch.equal(pipeline(**call).images, expected)
    assert torch.equal(pipeline(**call).images, expected)  # the encoder loads again


@pytest.mark.parametrize("kind", ["ours", "deepfloyd"])
def test_a_streamed_cascade_moves_to_another_number_format_and_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make = make_tiny_cascade if kind == "ours" else make_if
    make(tmp_path / "model")
    call: dict[str, Any] = {"prompt": "a red apple", "seed": 1, "steps": 1, "output_type": "pt"}
    whole = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu")
    expected = whole.to("cpu", torch.bfloat16)(**call).images
    monkeypatch.setattr("cascade.system.device.free_bytes", lambda _device=None: 1000)
    streamed = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu", low_memory=True)
    assert torch.equal(streamed.to("cpu", torch.bfloat16)(**call).images, expected)
    assert torch.equal(streamed(**call).images, expected)  # loaded again, and moved again
