"""Files of others and finished results are never overwritten: the command refuses with one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from helpers_training import log_entries, micro_config, trainer
from PIL import Image

from cascade import CascadeError, CascadePipeline
from cascade.cli.program import main
from cascade.evaluation.report import check_folder
from cascade.pictures.reading import check_png
from cascade.settings import to_yaml

MINE = "somebody's\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def generate(model: Path, out: Path, *options: str) -> int:
    words = ["generate", "a fox", "--model", str(model), "--device", "cpu", "--until", "8", "--seed", "1"]
    return main([*words, "--out", str(out), *options])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(status: int, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Status 2, and one line with the name of what is in the way."""
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert name in line


# --- drawing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.html", "grid.png", "manifest.parquet", "notes.txt", "000000-a-dog.png"])
def test_overwrite_removes_what_the_run_made_and_nothing_else(model: Path, out: Path, name: str) -> None:
    (out / name).write_text(MINE)
    assert generate(model, out, "--overwrite") == 0
    assert generate(model, out, "--overwrite", "--seed", "2") == 0
    assert (out / name).read_text() == MINE
    assert (out / "000000-a-fox.png").exists()


def test_overwrite_removes_the_page_the_sheet_and_the_table_of_the_run(model: Path, out: Path) -> None:
    assert generate(model, out, "--html", "--grid", "--manifest", "parquet") == 0
    assert {"index.html", "grid.png", "manifest.parquet"} <= snapshot(out).keys()
    assert generate(model, out, "--html", "--grid", "--manifest", "parquet") == 0  # written again
    assert generate(model, out, "--overwrite", "--seed", "2") == 0
    assert not {"index.html", "grid.png", "manifest.parquet"} & snapshot(out).keys()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("index.html", MINE, ["--html"]),
        ("grid.png", MINE, ["--grid"]),
        ("manifest.parquet", MINE, ["--manifest", "parquet"]),
        ("run.json", '{"seed": 3, "name": "mine"}', []),
        ("run.json", "no JSON", []),
        ("failures.jsonl", MINE, []),
        ("manifest.jsonl", '{"packages": []}\n', []),
        ("000000-a-fox.png", MINE, []),
        ("000000.tar", MINE, ["--format", "webdataset"]),
    ],
)
def test_what_a_run_would_replace_and_did_not_make_is_refused(
    model: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    options: list[str],
    overwrite: list[str],
) -> None:
    (out / name).write_text(content)
    refused(generate(model, out, *options, *overwrite), capsys, name if name != "manifest.jsonl" else str(out))
    assert (out / name).read_text() == content


def test_a_picture_that_a_killed_run_wrote_before_its_line_is_its_own(model: Path, out: Path) -> None:
    assert generate(model, out) == 0
    drawn = (out / "000000-a-fox.png").read_bytes()
    (out / "manifest.jsonl").write_bytes(b"")
    assert generate(model, out) == 0
    assert (out / "000000-a-fox.png").read_bytes() == drawn


def test_a_picture_drawn_again_writes_over_nothing(
    model: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, tmp_path / "first") == 0
    assert generate(model, tmp_path / "second", "--seed", "2") == 0
    picture = tmp_path / "first" / "000000-a-fox.png"
    again = ["generate", "--from-image", str(picture), "--model", str(model), "--device", "cpu", "--out"]
    capsys.readouterr()
    (out / picture.name).write_text(MINE)
    for options in ([], ["--overwrite"]):
        refused(main([*again, str(out), *options]), capsys, picture.name)
        assert (out / picture.name).read_text() == MINE
    other = tmp_path / "second" / picture.name
    before = other.read_bytes()
    refused(main([*again, str(other.parent)]), capsys, "exists, and is another picture; give --overwrite")
    assert other.read_bytes() == before
    assert main([*again, str(other.parent), "--overwrite"]) == 0
    assert other.read_bytes() == picture.read_bytes()
    assert main([*again, str(other.parent)]) == 0  # the same bytes are there


# --- enlarging ---------------------------------------------------------------------------------------------


def test_enlarging_and_drawing_do_not_share_a_folder(
    model: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, out) == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    upscale = ["upscale", str(tmp_path / "red.png"), "--model", str(model), "--device", "cpu", "--to", "16", "--out"]
    before = snapshot(out)
    capsys.readouterr()
    refused(main([*upscale, str(out)]), capsys, "manifest.jsonl: not written by `cascade upscale`; name another folder")
    assert snapshot(out) == before
    assert generate(model, out) == 0  # it goes on
    assert main([*upscale, str(tmp_path / "large")]) == 0
    before = snapshot(tmp_path / "large")
    for options in ([], ["--overwrite"]):
        capsys.readouterr()
        refused(generate(model, tmp_path / "large", *options), capsys, str(tmp_path / "large"))
        assert snapshot(tmp_path / "large") == before


def test_enlarging_replaces_its_own_pictures_alone(
    model: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    Image.new("RGB", (9, 9), "blue").save(out / "red.png")
    before = (out / "red.png").read_bytes()
    call = ["upscale", str(tmp_path / "red.png"), "--model", str(model), "--device", "cpu", "--to", "16"]
    for options in ([], ["--overwrite"]):
        assert main([*call, "--out", str(out), *options]) == 2
        assert "red.png: exists, and `cascade upscale` did not write it" in capsys.readouterr().err
        assert (out / "red.png").read_bytes() == before


# --- single files ------------------------------------------------------------------------------------------


def test_a_sheet_of_curves_or_views_replaces_its_own_kind_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert trainer(micro_config(tmp_path / "run")).run()
    for _ in range(2):
        assert main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "curves.png")]) == 0
    capsys.readouterr()
    mine = tmp_path / "mine.png"
    Image.new("RGB", (3, 3)).save(mine)
    before = mine.read_bytes()
    for words in (["plot", str(tmp_path / "run"), "--out"], ["check-data", str(tmp_path / "run.yaml"), "--sheet"]):
        refused(main([*words, str(mine)]), capsys, "mine.png: exists, and `cascade")
        assert mine.read_bytes() == before
    check_png(tmp_path / "curves.png", "cascade plot")
    with pytest.raises(CascadeError, match="`cascade check-data` did not write it"):
        check_png(tmp_path / "curves.png", "cascade check-data")


@pytest.mark.parametrize("name", ["report.json", "report.md", "contact.png"])
def test_a_report_replaces_a_report_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"format": 1}')
    with pytest.raises(CascadeError, match=rf"{name}: exists, but is not from a report"):
        check_folder(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 1, "suite": "sr", "figures": []}')
    check_folder(tmp_path)


def test_a_saved_cascade_is_replaced_and_with_it_nothing_else(model: Path, tmp_path: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    for _ in range(2):
        pipeline.save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text(MINE)
    with pytest.raises(CascadeError, match="copy: holds other files; name a new or empty folder"):
        pipeline.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "notes.txt").read_text() == MINE


# --- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "stage/notes.txt", "adapter/notes.txt", "samples/1.png"])
def test_a_new_run_does_not_overwrite_existing_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(MINE)
    for resume in (False, True):
        with pytest.raises(CascadeError) as raised:
            trainer(micro_config(tmp_path)).run(resume)
        assert name.partition("/")[0] in str(raised.value) or "no usable checkpoint" in str(raised.value)
        assert {key: value for key, value in snapshot(tmp_path).items() if key != ".lock"} == {name: MINE.encode()}


def test_settings_that_a_run_reads_keep_their_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`output: .` beside them."""
    monkeypatch.chdir(tmp_path)
    text = "# why it is so\n" + to_yaml(micro_config("."))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CascadeError, match=r"config\.yaml: exists, but is not from a run; set another output"):
        trainer(micro_config(".")).run()
    assert (tmp_path / "config.yaml").read_text() == text


LEAVE: dict[str, Callable[[Path], None]] = {
    "without checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "without anything else": lambda run: [  # type: ignore[func-returns-value]
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in run.iterdir() if path.name != "stage"
    ],
}


@pytest.mark.parametrize("left", LEAVE)
@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_over(tmp_path: Path, left: str, resume: bool) -> None:
    run = tmp_path / "run"
    assert trainer(micro_config(run)).run()
    LEAVE[left](run)
    before = snapshot(run / "stage")
    with pytest.raises(CascadeError, match=r"run/stage: exists, but its checkpoints are missing"):
        trainer(micro_config(run)).run(resume)
    assert snapshot(run / "stage") == before


def test_a_run_that_was_killed_between_its_first_stage_and_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def die(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cascade.training.trainer.save_state", die)
    with pytest.raises(KeyboardInterrupt):
        trainer(micro_config(run)).run()
    assert (run / "stage" / "stage.json").is_file()
    monkeypatch.undo()
    assert trainer(micro_config(run)).run(resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] != []
    assert not (run / "checkpoints" / ".begun").exists()


def test_a_run_resumes_and_keeps_settings_that_somebody_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert trainer(micro_config(run, "training.steps=2")).run()
    (run / "config.yaml").write_text(MINE)
    assert trainer(micro_config(run, "training.steps=4")).run(resume=True)
    assert (run / "config.yaml").read_text() == MINE
    assert "config.yaml: was not written by a run, left unchanged" in caplog.text
    assert [entry["step"] for entry in log_entries(run)][-1] == 4


def test_a_folder_called_stage_that_is_none_is_not_deleted_when_a_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trainer(micro_config(run, "training.steps=2")).run()
    shutil.rmtree(run / "stage")
    (run / "stage").mkdir()
    (run / "stage" / "notes.txt").write_text(MINE)
    with pytest.raises(CascadeError, match=r"run/stage: exists, but is not a run's stage"):
        trainer(micro_config(run, "training.steps=4")).run(resume=True)
    assert snapshot(run / "stage") == {"notes.txt": MINE.encode()}
