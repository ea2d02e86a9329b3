"""A batch from Python equals the batch of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

from cascade import CascadeError, generate_files
from cascade.cli.program import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_call_and_the_command_write_the_same_files_and_continue_each_other(model: str, tmp_path: Path) -> None:
    wishes = {"model": model, "device": "cpu", "seed": 3, "until": 8}
    outcome = generate_files(["a fox", "two stars"], tmp_path / "call", **wishes)
    assert (outcome.pictures, outcome.kept, outcome.failures, outcome.stopped) == (2, 0, 0, False)
    assert outcome.folder == tmp_path / "call"
    command = ["generate", "a fox", "two stars", "--model", model, "--device", "cpu", "--seed", "3", "--until", "8"]
    assert main([*command, "--out", str(tmp_path / "command")]) == 0
    assert files(tmp_path / "call") == files(tmp_path / "command")
    assert len(files(tmp_path / "call")) == 2
    assert main([*command, "--out", str(tmp_path / "call")]) == 0
    assert generate_files(["a fox", "two stars"], tmp_path / "command", **wishes).kept == 2


def test_a_prompt_file_is_a_path_and_what_fails_is_counted(model: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "b", "steps": {"bse": 2}}\n')
    outcome = generate_files(tmp_path / "p.jsonl", tmp_path / "out", model=model, device="cpu", until=8)
    assert (outcome.pictures, outcome.failures) == (1, 1)
    assert "no stage is called 'bse'" in json.loads((tmp_path / "out/failures.jsonl").read_text())["reason"]
    one = generate_files("a fox", tmp_path / "one", model=model, device="cpu", until=8, seed=outcome.seed)
    assert one.pictures == 1


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"sead": 3}, "generate_files: 'sead' is not known; did you mean seed?"),
        ({"seed": 3, "steps": {"bse": 2}}, "steps: no stage is called 'bse'"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_written(
    model: str, tmp_path: Path, wishes: dict[str, object], message: str
) -> None:
    with pytest.raises(CascadeError) as caught:
        generate_files(["a fox"], tmp_path / "out", model=model, device="cpu", **wishes)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_the_default_style_and_its_pictures_are_drawn_again(model: str, tmp_path: Path) -> None:
    """The prompt is recorded as drawn, so that redrawing needs no default style; another one is another run."""
    call = {"model": model, "device": "cpu", "seed": 3, "until": 8}
    generate_files(["a fox", "a star, fox style"], tmp_path / "out", default_style="fox style", **call)
    generate_files(["a fox, fox style", "a star, fox style"], tmp_path / "plain", **call)
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a fox, fox style", "a star, fox style"]
    drawn = files(tmp_path / "out")
    name = next(name for name in drawn if "a-fox" in name)
    again = [
        "generate",
        "--from-image",
        str(tmp_path / "out" / name),
        "--model",
        model,
        "--out",
        str(tmp_path / "again"),
    ]
    assert main(again) == 0
    assert files(tmp_path / "again")[name] == drawn[name]
    command = ["generate", "a fox", "a star, fox style", "--model", model, "--device", "cpu", "--seed", "3"]
    command += ["--until", "8", "--out", str(tmp_path / "out")]
    assert main([*command, "--default-style", "fox style"]) == 0, "continues"
    assert main([*command, "--default-style", "none"]) != 0, "is another run"
