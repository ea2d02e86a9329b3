"""`cascade evaluate`: a report of any cascade, equal when repeated, and a one-line error for every wrong call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

from cascade.cli.program import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line."""
    capsys.readouterr()
    status = main(["evaluate", *(str(argument) for argument in arguments)])
    return (status, *capsys.readouterr())


def test_a_run_leaves_a_report_that_says_how_it_was_made_and_is_the_same_twice(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outs = [tmp_path / "once", tmp_path / "twice"]
    for out in outs:
        status, said, _ = run(capsys, model, "--suite", "scenes", "--limit", 8, "--seed", 5, "--steps", 1, "--out", out)
        assert status == 0
        assert "| all correct |" in said
    for name in ("report.json", "report.md", "contact.png"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    report = json.loads((outs[0] / "report.json").read_text())
    assert report["seed"] == 5
    assert report["model"]["name"] == "tiny"
    assert len(report["model"]["sha256"]) == 64
    assert set(report["versions"]) == {"cascade", "torch", "transformers", "tokenizers", "pillow", "numpy"}
    assert report["settings"]["limit"] == report["settings"]["prompts"] == 8
    assert report["settings"]["sampling"]["base"]["steps"] == 1
    assert report["settings"]["sampling"]["base"]["guidance"] == 2  # the model's own default, written out


def test_another_weight_is_another_hash(model: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    from cascade.batch.metadata import weights_sha256
    from cascade.storage.index import read_index

    other = make_tiny_cascade(tmp_path / "other")
    assert weights_sha256(read_index(other)) == weights_sha256(read_index(model))
    path = other / "sr16" / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[weights[name].numel() // 2] += 1
    save_file(weights, path)
    assert weights_sha256(read_index(other)) != weights_sha256(read_index(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--suite"),
        (["--suite", "beauty"], "'beauty' is not one of 'scenes'"),
        (["--suite", "scenes", "--limit", "0"], "--limit"),
        (["--suite", "scenes", "--steps", "upper=3"], "steps: no stage is called 'upper'"),
        (["--suite", "scenes", "--sampler", "magic"], "sampler"),
        (["--suite", "scenes", "--data", "pictures"], "--data: the suite scenes does not use it"),
        (["--suite", "scenes", "--until", "8"], "--until: the suite scenes does not use it"),
        (["--suite", "sr", "--further", "2"], "--further: the suite sr does not use it"),
        (["--suite", "art"], "--suite art: needs true pictures"),
        (["--suite", "art", "--data", "nowhere"], "--data nowhere: no train-64*.parquet;"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(
    model: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, _, err = run(capsys, model, *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_reported_before_drawing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cascade.evaluation.report.draw", None)
    (tmp_path / "file").write_text("kept")
    status, _, err = run(capsys, model, "--suite", "scenes", "--out", tmp_path / "file" / "report")
    assert status == 2
    assert "is not a writable folder" in err
    assert (tmp_path / "file").read_text() == "kept"
