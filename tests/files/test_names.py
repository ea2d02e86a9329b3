"""Names whose bytes are not UTF-8, and paths that cannot be looked at, end no command in a traceback."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade.cli import main
from cascade.config import WebDatasetSource
from cascade.data.sources import open_records
from cascade.files.text import json_text

CAFE = os.fsdecode(b"caf\xe9")
TOO_LONG = "x" * 300
"""What the system refuses to look at, as it refuses what lies in a folder that one may not enter."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def test_json_is_written_for_any_name_and_gives_it_back() -> None:
    for name in ("fox", "füchsin 🦊", CAFE):
        assert json.loads(json_text({"name": name}).encode()) == {"name": name}
    assert json_text("füchsin") == '"füchsin"'


def test_a_picture_of_such_a_name_is_enlarged_and_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"{CAFE}.png")
    call = ["upscale", str(tmp_path / f"{CAFE}.png"), "--out", str(tmp_path / CAFE), "--to", "16", "--prompt", CAFE]
    for said in ("16x16", "kept"):
        assert main([*call, "--model", str(model), "--device", "cpu"]) == 0
        assert said in capsys.readouterr().out
    with Image.open(tmp_path / CAFE / f"{CAFE}.png") as image:
        assert image.info["source"] == "caf\ufffd.png"
    (line,) = (tmp_path / CAFE / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["file"] == f"{CAFE}.png"


def test_the_name_of_a_model_a_folder_and_prompts_may_be_such(model: Path, tmp_path: Path) -> None:
    out = tmp_path / CAFE
    saved = tmp_path / "model"
    parts = [word for name in ("base", "sr16", "sr32") for word in ("--stage", str(model / name))]
    text = ["--text-encoder", str(model / "text_encoder")]
    assert main(["assemble", *text, *parts, "--name", CAFE, "--license", CAFE, "--out", str(saved)]) == 0
    assert main(["info", str(saved)]) == 0
    options = ["--model", str(saved), "--device", "cpu", "--until", "8", "--negative-prompt", CAFE]
    extras = ["--html", "--grid", "--manifest", "parquet", "--seed", "1"]
    for format in ("png", "jpeg"):
        arguments = ["generate", CAFE, *options, *extras, "--format", format, "--out", str(out / format)]
        assert main(arguments) == 0
        assert len([*(out / format).glob("0*.*")]) == 1
    assert "<title>" in (out / "png" / "index.html").read_text(encoding="utf-8")


def test_a_folder_of_weights_may_not_be_called_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The libraries that read and write weights and words take no such path."""
    (tmp_path / CAFE).symlink_to(model)
    for command in (["generate", "a fox", "--model"], ["info"]):
        assert main([*command, str(tmp_path / CAFE)]) == 2
        assert "not UTF-8; rename it" in capsys.readouterr().err
    words = f"assemble --text-encoder {model}/text_encoder --stage {model}/base --name a --license b --out"
    assert main([*words.split(), str(tmp_path / CAFE / "out")]) == 2
    assert "not UTF-8; rename it" in capsys.readouterr().err


def test_names_are_printed_whatever_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "utf-8", write_through=True))
    assert main(["info", str(tmp_path / CAFE)]) == 2
    assert r"caf\udce9: its name is not UTF-8" in written.getvalue().decode()


def test_members_of_a_tar_may_be_called_so(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in ((f"{CAFE}.txt", b"a fox"), (f"{CAFE}.png", b"x"), ("b.txt", b"a star")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    records = open_records(WebDatasetSource(files=(str(tmp_path / "0.tar"),)))
    assert [records[number].captions for number in range(2)] == [("a fox",), ("a star",)]
    assert records[0].origin.endswith(": caf\ufffd")


@pytest.mark.parametrize(
    "command",
    [
        "generate --prompts {path}/p.txt",
        "generate --from-image {path}/a.png",
        "generate fox --model {path}/model",
        "generate fox --model {model} --out {path}/out",
        "upscale {path}/a.png --model {model}",
        "upscale {picture} --model {model} --out {path}/out",
        "train {path}/run.yaml",
        "encode {path}/run.yaml",
        "check-data {path}/run.yaml",
        "info {path}/model",
        "plot {path}/run",
        "evaluate --suite sr --data {path}/data --out {here}/report",
        "evaluate {path}/model --suite sr --data {here} --out {here}/report",
        "evaluate --suite sr --data {here} --out {path}/report",
        "convert {path}/if {here}/out",
        "convert {model} {path}/out",
        "assemble --text-encoder {path}/t5 --stage {model}/base --name a --license b --out {here}/out",
        "assemble --text-encoder bundled --stage {path}/base --name a --license b --out {here}/out",
        "assemble --text-encoder {model}/text_encoder --stage {model}/base --name a --license b --out {path}/out",
    ],
)
def test_a_path_that_cannot_be_looked_at_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    words = command.format(path=tmp_path / TOO_LONG, model=model, here=tmp_path, picture=tmp_path / "picture.png")
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert TOO_LONG in err
    assert "File name too long" in err or "no such" in err or "no stage here" in err
