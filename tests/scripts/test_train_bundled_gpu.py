"""scripts/train_bundled_gpu.py from packed pictures to a stage that draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gpu.network import write_parts
from helpers_art import picture, record
from helpers_text import make_tiny_t5
from PIL import Image
from train_bundled_gpu import is_compiled, main

from cascade.storage.stage import load_stage

Call = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def pack(packed: Callable[..., Path]) -> Path:
    colours = ("red", "blue", "green", "purple")
    return packed([record(picture(colour), "noto", f"a {colour} star") for colour in colours * 8])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("encoder") / "t5", 32)


@pytest.fixture
def call(pack: Path, encoder: Path, configs: Path, tmp_path: Path) -> Call:
    def invoke(command: str, *arguments: str) -> tuple[int, str]:
        shared = ["--configs", str(configs)]
        if command != "stage":
            shared += ["--pack", str(pack), "--text-encoder", str(encoder), "--choice", str(tmp_path / "choice.json")]
            shared += ["--device", "cpu", "--batch", "4"]
        if command == "train":
            shared += ["--held-out", str(pack), "--scenes", "20", "--log-every", "1"]
        done = CliRunner().invoke(main, [command, *shared, *arguments])
        return done.exit_code, done.output

    return invoke


def test_two_stages_are_trained_and_become_folders_that_load(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = call("train", "--out", str(out), "--minutes", "0.005", "--sr-minutes", "0.005", "--crops", "0.5")
    assert status == 0, said
    for name in ("base", "sr256"):
        for kind in ("", "raw-", "guide-", "other-"):
            assert (out / f"{kind}{name}-0.safetensors").is_file()
        assert json.loads((out / f"{name}.jsonl").read_text().splitlines()[0])["step"] == 1
        status, said = call("stage", name, "--weights", str(out), "--out", str(tmp_path / name))
        assert status == 0, said
        stage = load_stage(tmp_path / name)
        assert stage.name == name
        assert all(torch.isfinite(weight).all() for weight in stage.network.parameters())
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "own.png") as own:
        assert sheet.size == (1024, 512)
        assert own.size == (1024, 256)


@pytest.mark.slow
def test_the_second_stage_continues_from_existing_weights(call: Call, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("train", "--out", str(first), "--minutes", "0.02", "--sr-minutes", "0.02")[0] == 0
    more = ["--minutes", "0", "--sr-minutes", "0.02", "--init", str(first), "--own-pictures", "3"]
    status, said = call("train", "--out", str(second), *more)
    assert status == 0, said
    assert "3 pictures finished" in said
    assert not list(second.glob("base-*"))
    # The base stage is the one that was there, up to bf16, in which its weights were kept.
    with Image.open(first / "sheet.png") as before, Image.open(second / "sheet.png") as after:
        assert np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).mean() < 1


def test_no_minutes_without_initial_weights_is_reported_before_loading(call: Call, tmp_path: Path) -> None:
    status, said = call("train", "--out", str(tmp_path / "out"), "--minutes", "0")
    assert status == 2
    assert "--init" in said
    assert "texts" not in said


def test_weights_to_go_on_from_are_looked_at_before_anything_is_loaded(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for init, message in (("none", "does not exist"), ("empty", "holds no raw-base-*.safetensors")):
        status, said = call("train", "--out", str(tmp_path / "out"), "--init", str(tmp_path / init))
        assert status in (1, 2)
        assert message in said
        assert "texts" not in said


def test_a_width_that_differs_from_the_text_encoders_is_reported_with_the_file(
    call: Call, configs: Path, tmp_path: Path
) -> None:
    (configs / "sr256.yaml").write_text((configs / "sr256.yaml").read_text().replace("text_dim: 32", "text_dim: 16"))
    status, said = call("train", "--out", str(tmp_path / "out"))
    assert status == 1
    assert "sr256.yaml: model.text_dim is 16, the text encoder gives 32" in said
    assert "texts" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "base.yaml: no such file"),
        ("steps: 3", "base.yaml: has no section `stage`"),
        ("stage: {name: base, resolution: 64, model: {chanels: [8]}}", "did you mean"),
    ],
)
def test_wrong_settings_of_a_stage_are_a_one_line_error(
    call: Call, configs: Path, tmp_path: Path, settings: str | None, message: str
) -> None:
    file = configs / "base.yaml"
    file.unlink() if settings is None else file.write_text(settings)
    status, said = call("train", "--out", str(tmp_path / "out"))
    assert status == 1
    assert message in said


def test_a_stage_of_other_weights_is_refused_and_nothing_is_written(call: Call, tmp_path: Path) -> None:
    write_parts({"weight": torch.zeros(3)}, tmp_path / "weights", "base")
    status, said = call("stage", "base", "--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "base"))
    assert status == 1
    assert "the weights belong to other settings" in said
    assert not (tmp_path / "base").exists()


def test_the_faster_way_is_taken_and_eager_where_nothing_was_measured(tmp_path: Path) -> None:
    choice = tmp_path / "choice.json"
    assert not is_compiled(choice, "base")
    choice.write_text(json.dumps({"base True": 9.0, "base False": 3.0, "sr256 True": 2.0, "sr256 False": 3.0}))
    assert is_compiled(choice, "base")
    assert not is_compiled(choice, "sr256")
