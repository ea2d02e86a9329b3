"""scripts/train_bundled_gpu.py from packed pictures to a stage that draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers_art import picture, record
from helpers_text import make_tiny_t5
from PIL import Image
from train_bundled_gpu import main

from cascade.load import load_stage


@pytest.fixture
def call(
    packed: Callable[[list[dict[str, Any]]], Path], configs: Path, tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    colours = ("red", "blue", "green", "purple")
    pack = packed([record(picture(colour), "noto", f"a {colour} star") for colour in colours * 8])
    encoder = make_tiny_t5(tmp_path / "t5", 32)

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


def test_two_stages_are_trained_and_become_folders_that_load(
    call: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, said = call("train", "--out", str(out), "--minutes", "0.03", "--sr-minutes", "0.03", "--crops", "0.5")
    assert status == 0, said
    for name in ("base", "sr256"):
        for kind in ("", "raw-", "guide-", "other-"):
            assert (out / f"{kind}{name}-0.safetensors").is_file()
        status, said = call("stage", name, "--weights", str(out), "--out", str(tmp_path / name))
        assert status == 0, said
        stage = load_stage(tmp_path / name)
        assert stage.name == name
        assert all(torch.isfinite(weight).all() for weight in stage.network.parameters())
    with Image.open(out / "sheet.png") as sheet, Image.open(out / "own.png") as own:
        assert sheet.size == (1024, 512)
        assert own.size == (1024, 256)


def test_the_second_stage_goes_on_from_what_is_there(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
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


def test_no_minutes_and_nothing_to_go_on_from_is_told_before_anything_is_loaded(
    call: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, said = call("train", "--out", str(tmp_path / "out"), "--minutes", "0")
    assert status == 2
    assert "--init" in said
    assert "texts" not in said
