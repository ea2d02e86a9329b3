"""A matrix: each cell is the picture that its settings draw alone; the sheet shows it in its row and column."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image
from training.test_lora import write_adapter

import cascade
from cascade import CascadeError, generate_files
from cascade.batch.matrix import Axis, Matrix
from cascade.cli.program import main

SEED = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny")


def command(model: Path, out: Path, *more: object) -> list[str]:
    usual = ["generate", "--model", model, "--device", "cpu", "--seed", SEED, "--until", 8, "--out", out]
    return [*map(str, usual), *map(str, more)]


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB"))


def cells(out: Path) -> list[np.ndarray[Any, Any]]:
    return [pixels(path) for path in sorted(out.glob("0*.png"))]


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("steps=10,20", "steps", (10, 20)),
        ("guidance = 1.5 | base=2,sr16=3", "guidance", (1.5, {"base": 2.0, "sr16": 3.0})),
        ("seed=1..3", "seed", (1, 2, 3)),
        ("steps=10..50:20,64", "steps", (10, 30, 50, 64)),
        ("aug-level=0,0.5", "aug_level", (0.0, 0.5)),
        ("threshold=clip,none,0.99", "threshold", ("clip", "none", 0.99)),
        ("projection=0,1", "projection", ({"parallel": 0.0}, {"parallel": 1.0})),
        ("preset=fast,best", "preset", ("fast", "best")),
        ("words=red,green", "words", ("red", "green")),
        ("prompt=a fox, noto style|a cat", "prompt", ("a fox, noto style", "a cat")),
        ("negative-prompt=,dull", "negative_prompt", ("", "dull")),
        ("lora=0,-0.5", "lora", (0.0, -0.5)),
    ],
)
def test_an_axis_is_a_setting_and_its_values(text: str, name: str, values: tuple[Any, ...]) -> None:
    axis = Axis.read(text)
    assert (axis.name, axis.values) == (name, values)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["stepps=1"], "'stepps=1'; did you mean steps"),
        (["steps"], "written like steps=10,20,40"),
        (["steps=1,x"], "--matrix steps: 'x' is not a whole number"),
        (["steps=1,,2"], "--matrix steps: a value is empty"),
        (["seed=-1"], "--matrix seed: '-1'; expected a whole number in 0"),
        (["seed=9..1"], "'9..1'; expected a range"),
        (["preset=good"], "--matrix preset: 'good'; expected one of fast, default, best"),
        (["steps=1", "steps=2"], "--matrix: steps is given twice"),
        (["steps=1", "seed=2", "guidance=3"], "--matrix: 3 axes"),
        (["seed=1..200", "steps=1..100"], "20,000 pictures; at most 10,000"),
    ],
)
def test_a_wrong_matrix_is_refused_in_one_line(texts: list[str], message: str) -> None:
    with pytest.raises(CascadeError) as caught:
        Matrix.read(texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cells_are_counted_row_by_row_and_words_are_replaced_in_whole_prompts() -> None:
    matrix = Matrix.read(["words=red,blue", "prompt=a red fox|a red red star"])
    assert [record.prompt for record in matrix.records("", SEED)] == [
        "a red fox",
        "a blue fox",
        "a red red star",
        "a blue blue star",
    ]
    assert [record.seed for record in Matrix.read(["seed=1,2", "steps=3,4"]).records("a", SEED)] == [1, 2, 1, 2]


def test_cells_of_one_adapter_scale_are_neighbours_and_keep_their_places() -> None:
    records = Matrix.read(["lora=1,0", "seed=1,2"]).records("a", SEED)
    assert [(record.adapter_factor, record.index) for record in records] == [(0, 1), (0, 3), (1, 0), (1, 2)]


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "alone"),
    [
        (["steps=1,3"], [["--steps", 1], ["--steps", 3]]),
        (["sampler=ddim,heun"], [["--sampler", "ddim"], ["--sampler", "heun"]]),
        (["negative-prompt=,dull"], [[], ["--negative-prompt", "dull"]]),
        (["guidance=1,3", "aug-level=0,0.5"], [["--guidance", 1], ["--guidance", 3]]),
    ],
)
def test_a_cell_is_the_picture_of_its_settings_alone(
    model: Path, tmp_path: Path, axes: list[str], alone: list[list[object]]
) -> None:
    matrix = [part for axis in axes for part in ("--matrix", axis)]
    assert main(command(model, tmp_path / "out", "a fox", *matrix)) == 0
    for place, options in enumerate(alone):
        assert main(command(model, tmp_path / str(place), "a fox", *options)) == 0
        assert np.array_equal(cells(tmp_path / "out")[place], cells(tmp_path / str(place))[0])
    assert len({cell.tobytes() for cell in cells(tmp_path / "out")}) > 1


def test_an_axis_of_adapter_scales_draws_as_the_scaled_adapter_does_and_as_none_at_zero(
    model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(model, tmp_path / "a", seed=1)
    out = tmp_path / "out"
    assert (
        main(command(model, out, "a fox", "--lora", adapter, "--matrix", "lora=1,0,0.5", "--matrix", "seed=5,6")) == 0
    )
    assert main(command(model, tmp_path / "half", "a fox", "--lora", f"{adapter}:0.5")) == 0
    assert main(command(model, tmp_path / "none", "a fox")) == 0
    drawn = cells(out)
    assert np.array_equal(drawn[2], cells(tmp_path / "half")[0])
    assert np.array_equal(drawn[1], cells(tmp_path / "none")[0])
    again = ["--from-image", out / "000002-a-fox.png", "--lora", f"{adapter}:0.5", "--out", tmp_path / "again"]
    assert main(["generate", "--model", str(model), *map(str, again)]) == 0  # a cell is a picture like any other


def test_the_sheet_shows_each_cell_in_its_place_and_gray_for_none(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(model, out, "a fox", "--matrix", "seed=1..3", "--matrix", "guidance=1,3")) == 0
    sheet, drawn = Image.open(out / "matrix.png"), cells(out)
    assert len(drawn) == 6
    left, top = sheet.width - 3 * 260, sheet.height - 2 * 260
    found = np.asarray(sheet.convert("RGB"))
    assert (found[:top] < 128).any(axis=(1, 2)).any()  # labels of columns
    assert (found[top:, :left] < 128).any()  # labels of rows
    for index, cell in enumerate(drawn):
        row, column = divmod(index, 3)
        place = sheet.crop((left + column * 260, top + row * 260, left + column * 260 + 256, top + row * 260 + 256))
        expected = np.asarray(Image.fromarray(cell).resize((256, 256), Image.Resampling.BICUBIC))
        assert np.abs(np.asarray(place.convert("RGB")).astype(int) - expected).mean() < 2
    (out / "000004-a-fox.png").unlink()
    (out / "manifest.jsonl").write_text("".join((out / "manifest.jsonl").read_text().splitlines(keepends=True)[:4]))
    matrix = Matrix.read(["seed=1..3", "guidance=1,3"])
    assert len(matrix) == 6


def test_the_same_matrix_again_draws_nothing_and_another_one_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = command(model, tmp_path / "out", "a fox", "--matrix", "seed=1,2")
    assert main(call) == 0
    monkeypatch.setattr("cascade.drawing.engine.draw_batch", None)
    assert main(call) == 0
    assert "2 of them from an earlier run" in capsys.readouterr().out
    assert main([*call[:-1], "seed=1,3"]) == 2
    assert "other settings (matrix was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["a fox", "--matrix", "steps=0,5"], "--matrix, 'steps 0': stage base: steps: "),
        (["a fox", "--matrix", "sampler=ddim,eulr"], "--matrix, 'sampler eulr'"),
        (["a fox", "--matrix", "guidance=bse=3"], "guidance: no stage is called 'bse'"),
        (["a fox", "--matrix", "words=red,blue"], "--matrix words: 'red' is not in the prompt 'a fox'"),
        (["a fox", "a cat", "--matrix", "steps=1,2"], "--matrix: 2 prompts; expected one prompt"),
        (["a fox", "--matrix", "prompt=a|b"], "--matrix: 1 prompts; expected no other prompt"),
        (["a fox", "--matrix", "lora=0,1"], "--matrix lora: there is no adapter to scale"),
        (["a fox", "-n", 2, "--matrix", "steps=1,2"], "leave out -n"),
        (["a fox", "--format", "webdataset", "--matrix", "steps=1,2"], "leave out --shard and tar shards"),
        (["--travel", "a", "b", "--matrix", "prompt=a|b"], "cannot be combined with --travel"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[object], message: str
) -> None:
    assert main(command(model, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1 or error.startswith("Usage")
    assert not list(tmp_path.glob("out/*.png"))


def test_a_matrix_in_python_is_that_of_the_command(model: Path, tmp_path: Path) -> None:
    made = generate_files(
        [], tmp_path / "call", model=str(model), device="cpu", seed=SEED, until=8, matrix=["prompt=a fox|a cat"]
    )
    assert made.pictures == 2
    assert main(command(model, tmp_path / "out", "--matrix", "prompt=a fox|a cat")) == 0
    for name in ("matrix.png", "000001-a-cat.png"):
        assert (tmp_path / "call" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_a_sheet_continues_after_kills_and_is_that_of_one_run(model: Path, tmp_path: Path) -> None:
    axes = ["--matrix", "seed=1..10", "--matrix", "steps=2,3,4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cascade.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command(model, tmp_path / "whole", "a fox", *axes)) == 0
    finally:
        torch.set_num_threads(threads)
    out, rng, hits = tmp_path / "out", random.Random(0), 0
    call = [sys.executable, "-m", "cascade", *command(model, out, "a fox", *axes)]
    for lines in (3, 12, 22):
        process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        manifest = out / "manifest.jsonl"
        while process.poll() is None and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= lines):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        hits += process.poll() is None
        process.kill()
        process.wait()
    assert hits >= 2
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    assert subprocess.run(call, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    kept = [path for path, time_ns in before.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(before) - 1 >= 20  # all but at most the one whose line was missing
    for path in [*(tmp_path / "whole").glob("0*.png"), tmp_path / "whole" / "matrix.png"]:
        assert (out / path.name).read_bytes() == path.read_bytes()
