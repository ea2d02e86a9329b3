"""Faults in a long run give a one-line error, no finished picture is lost, and the same command continues."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_model import make_tiny_cascade
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from cascade import CascadeError
from cascade.batch.folder import Layout
from cascade.batch.output import Output
from cascade.batch.plan import subfolder
from cascade.batch.run import BackgroundWriter
from cascade.batch.stores import Finished
from cascade.batch.team import Claims
from cascade.cli.program import main
from cascade.drawing.batches import draw_batch

PROMPTS = [f"a fox in picture {number}" for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def generate(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *more: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of drawing `PROMPTS`, or those that `more` names."""
    prompts = [] if {"--prompts", "--"} & set(more) else PROMPTS
    options = ["--model", model, "--out", out, "--seed", 3, "--device", "cpu", "--until", 8, *more]
    capsys.readouterr()
    return (main(["generate", *prompts, *map(str, options)]), *capsys.readouterr())


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def assert_continues(capsys: pytest.CaptureFixture[str], model: Path, out: Path) -> None:
    """The same command finishes what is missing, and the result is that of an undisturbed run."""
    assert generate(capsys, model, out)[0] == 0
    undisturbed = out.with_name("undisturbed")
    assert generate(capsys, model, undisturbed)[0] == 0
    assert [(line["id"], line["sha256"]) for line in manifest(out)] == [
        (line["id"], line["sha256"]) for line in manifest(undisturbed)
    ]
    for line in manifest(out):
        assert (out / line["file"]).read_bytes() == (undisturbed / line["file"]).read_bytes()


# --- disks, folders, models --------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger: what a full disk does to writing, without root's rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [500, 2500])
def test_a_full_disk_is_told_and_loses_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with largest_file(size):  # smaller than run.json; or so that the manifest ends within a line
        status, stdout, stderr = generate(capsys, model, out)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"{out}: cannot be written: File too large" in stderr
    if size > 1000:
        assert 1 <= len(manifest(out)) < len(PROMPTS)
    assert_continues(capsys, model, out)


def writing(before: Callable[[int], object]) -> Callable[..., Any]:
    """`Output.write`, before which `before` hears the index."""
    write = Output.write

    def written(output: Output, finished: Finished) -> Any:
        before(finished.entry["index"])
        return write(output, finished)

    return written


def test_an_output_folder_that_disappears_ends_the_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", writing(lambda index: index == 2 and shutil.rmtree(out)))
        status, _, stderr = generate(capsys, model, out)
    assert (status, stderr.count("\n")) == (2, 1)
    assert f"{out}: cannot be written: No such file or directory" in stderr
    assert_continues(capsys, model, out)


def test_a_manifest_that_is_replaced_meanwhile_ends_the_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def replace(index: int) -> None:
        if index == 2:
            (out / "manifest.jsonl").unlink()
            (out / "manifest.jsonl").touch()

    monkeypatch.setattr(Output, "write", writing(replace))
    assert "it was replaced while the run wrote to it" in generate(capsys, model, out)[2]


@pytest.mark.parametrize("name", ["base/model.safetensors", "text_encoder/tokenizer.json", "sr16/stage.json"])
def test_a_model_that_cannot_be_read_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    (own / name).unlink()
    (own / name).mkdir()
    status, _, stderr = generate(capsys, own, tmp_path / "out")
    assert (status, stderr.count("\n")) == (2, 1), stderr
    assert str(own / Path(name).parent) in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        b"nonsense",
        b"\0" * 100,
        b"[" * 100_000,
        b"{}",
        b'{"index": 1e999}',
        b'{"index": 0, "number": 0, "file": 5}',
        b'{"index": 1, "number": 0, "num_images": 1, "id": "a", "prompt": "a", "negative_prompt": true, "seed": 1}',
        b'{"index": ' + b"9" * 30 + b', "number": 0}',
    ],
    ids=["words", "zeros", "brackets", "empty", "infinite", "types", "truth", "large"],
)
def test_a_spoilt_line_of_the_manifest_costs_that_line_and_no_other(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoilt: bytes
) -> None:
    out = tmp_path / "out"
    assert generate(capsys, model, out)[0] == 0
    lines = (out / "manifest.jsonl").read_bytes().splitlines()
    (out / "manifest.jsonl").write_bytes(b"\n".join([lines[0], spoilt, *lines[2:], b""]))
    status, stdout, stderr = generate(capsys, model, out)
    assert (status, stdout) == (0, f"6 pictures in {out}, 5 of them from an earlier run\n")
    assert f"{out / 'manifest.jsonl'}: 1 damaged lines are left out, the last of them b" in stderr
    assert (stderr.count("\n"), len(stderr) < 600) == (1, True)
    assert_continues(capsys, model, out)


# --- prompts -----------------------------------------------------------------------------------------------


def test_prompts_of_every_kind_are_drawn(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [
        "",
        "x" * 100_000,
        "🦊🏳️‍🌈👩‍👩‍👧‍👦",
        "תפוח אדום",
        "\u202eأحمر\u202c",
        "a\u0000b",
        "</script><b>",
        "--",
        "ﷺ" * 500,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # long ones are cut, with a warning
        status, _, _ = generate(capsys, model, tmp_path / "out", "--html", "--", *prompts)
    assert status == 0
    lines = manifest(tmp_path / "out")
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        with Image.open(tmp_path / "out" / line["file"]) as picture:
            assert picture.text["prompt"] == line["prompt"]  # type: ignore[attr-defined]


def test_strict_stops_at_the_first_bad_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\nbad\n"b"\n')
    status, _, stderr = generate(capsys, model, tmp_path / "out", "--strict", "--prompts", tmp_path / "p.jsonl")
    assert status == 2
    assert f"{tmp_path / 'p.jsonl'}:2: not valid JSON" in stderr
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a"]


# --- while it runs -----------------------------------------------------------------------------------------


def drawing(after: Callable[[int, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`draw_batch`, whose results, counted from 0, `after` may change."""
    count = iter(range(100))
    return lambda *arguments, **more: after(next(count), draw_batch(*arguments, **more))


def test_a_picture_of_nan_is_marked_failed_and_the_others_go_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def spoil(number: int, x: Tensor) -> Tensor:
        return x * (float("nan") if number == 2 else 1)

    with monkeypatch.context() as patch:
        patch.setattr("cascade.drawing.engine.draw_batch", drawing(after=spoil))
        status, stdout, stderr = generate(capsys, model, out)
    assert (status, stdout) == (1, f"5 pictures in {out}, 1 failed\n")
    assert "output is not finite" in stderr
    (failure,) = (out / "failures.jsonl").read_text().splitlines()
    assert (json.loads(failure)["index"], json.loads(failure)["number"]) == (2, 0)
    assert_continues(capsys, model, out)
    assert not (out / "failures.jsonl").exists()


def test_sigterm_finishes_the_picture_at_hand_and_the_same_command_continues(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def terminate(number: int, x: Tensor) -> Tensor:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    with monkeypatch.context() as patch:
        patch.setattr("cascade.drawing.engine.draw_batch", drawing(after=terminate))
        status, stdout, stderr = generate(capsys, model, out)
    assert (status, stdout, stderr) == (1, f"3 pictures in {out}\n", "cascade: stopped; the same command continues\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_continues(capsys, model, out)


def test_what_a_stopped_process_left_is_not_called_finished_by_the_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first of two sees it: the other took unit 1, was told to stop, and gave it back undone."""
    out = tmp_path / "out"
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "claim", lambda _, unit: unit != 1)
        status, _, stderr = generate(capsys, model, out)
    assert (status, stderr) == (1, "cascade: stopped; the same command continues\n")
    assert generate(capsys, model, out)[0] == 0


def test_what_other_processes_found_of_an_earlier_run_counts_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two speaks for both: here the other one found all but picture 1 of what was there."""
    out = tmp_path / "out"
    assert generate(capsys, model, out)[0] == 0
    sorted(out.glob("*.png"))[1].unlink()
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Output, "claim", lambda _, unit: unit == 1)
    monkeypatch.setattr(Output, "is_everything_done", lambda _output, _last: True)
    assert generate(capsys, model, out)[1] == f"6 pictures in {out}, 5 of them from an earlier run\n"


def test_a_second_run_on_the_folder_is_refused_while_the_first_lives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with Output(out) as output:
        output.begin({"seed": 3})
        status, _, stderr = generate(capsys, model, out, "--overwrite")
        assert (status, stderr.count("\n")) == (2, 1)
        assert f"{out}: another run writes into this folder (process {os.getpid()} on " in stderr
        with Output(out, Layout(shard=(1, 2))) as other:  # the lock is per shard
            other.begin({"seed": 3})
    assert generate(capsys, model, out)[0] == 0


def test_what_one_process_finished_no_other_does_again_and_what_a_dead_one_left_another_does(tmp_path: Path) -> None:
    def process() -> subprocess.Popen[str]:
        """Takes 0 and 1, finishes 0, and keeps 1 until it is killed."""
        code = (
            "import sys; from pathlib import Path; from cascade.batch.team import Claims\n"
            "claims = Claims(Path(sys.argv[1]))\n"
            "assert claims.take(0) and claims.take(1)\n"
            "claims.finish(0); print('ready', flush=True); sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "claims")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    ours, other = Claims(tmp_path / "claims"), process()
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == "ready\n"
    assert (ours.take(0), ours.is_done(0), ours.take(1)) == (True, True, False)
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert (ours.take(1), ours.is_done(1)) == (True, False)
    ours.clear()
    assert not ours.is_done(0)
    ours.close()


def test_a_process_leaves_out_what_another_of_its_launch_has_done(tmp_path: Path) -> None:
    with Output(tmp_path / "out") as output:
        output.begin({"seed": 3})
        output.team.count = 2
        assert output.claim(0)
        output.finish(0)
        assert not output.claim(0)
        assert output.claim(1)


def test_writing_happens_in_the_background_in_order_and_keeps_up() -> None:
    done: list[int] = []
    with BackgroundWriter(waiting=2) as writer:
        for number in range(5):
            writer.put(lambda number=number: (time.sleep(0.01), done.append(number)))  # type: ignore[misc]
        assert threading.active_count() > 1
        assert len(done) >= 1  # two may wait and one be at work: the others had to be done
    assert done == list(range(5))


def test_an_error_of_the_writer_ends_the_run() -> None:
    def fails() -> None:
        raise CascadeError("the disk is full")

    def draws() -> None:
        with BackgroundWriter() as writer:
            for work in [fails, *[lambda: time.sleep(0.001)] * 1000]:
                writer.put(work)

    with pytest.raises(CascadeError, match="disk"):
        draws()


# --- what is seen ------------------------------------------------------------------------------------------


def test_the_log_for_machines_tells_everything(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('"a"\nbad\n"b"\n')
    options = ("--log-json", "--prompts", tmp_path / "p.jsonl")
    status, stdout, _ = generate(capsys, model, tmp_path / "out", *options)
    events = [json.loads(line) for line in stdout.splitlines()]
    assert status == 1
    assert sorted(event["event"] for event in events) == ["begin", "end", "failure", "picture", "picture"]
    assert (events[0], events[-1]["pictures"], events[-1]["failures"]) == ({"event": "begin", "total": 3}, 2, 1)
    assert {event["file"] for event in events if event["event"] == "picture"} == {"000000-a.png", "000002-b.png"}
    again = [json.loads(line) for line in generate(capsys, model, tmp_path / "out", *options)[1].splitlines()]
    assert again[-1]["kept"] == 2


def test_the_bar_tells_speed_and_failures(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    (tmp_path / "p.jsonl").write_text('"a"\nbad\n"b"\n')
    stderr = generate(capsys, model, tmp_path / "out", "--prompts", tmp_path / "p.jsonl")[2]
    assert "2/3" in stderr
    assert "failed=1" in stderr
    assert "p.jsonl:2: not valid JSON" in stderr


def test_the_manifest_comes_as_a_table_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, model, tmp_path / "out", "--manifest", "parquet")[0] == 0
    rows = parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    for row, line in zip(rows, manifest(tmp_path / "out"), strict=True):
        assert json.loads(row.pop("settings")) == line.pop("settings")
        assert row == line | {"stages": None}


def test_pictures_past_ten_thousand_go_into_subfolders_by_index(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [subfolder(index, 1) for index in (0, 9_999, 10_000, 123_456)] == ["", "", "0001/", "0012/"]
    assert [subfolder(index, 4) for index in (2_499, 2_500)] == ["", "0001/"]
    monkeypatch.setattr(sys.modules["cascade.batch.plan"], "FILES_PER_FOLDER", 4)
    assert generate(capsys, model, tmp_path / "out")[0] == 0
    assert [line["file"].rpartition("/")[0] for line in manifest(tmp_path / "out")] == [""] * 4 + ["0001"] * 2
    assert_continues(capsys, model, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "5/4"), "'5/4'; expected number/count, such as 3/16"),
        (("--shard", "0/4"), "such as 3/16"),
        (("--batch-size", "0"), "0 is not in the range x>=1"),
        (("--batch-size", "many"), "or auto"),
        (("--html", "--format", "webdataset"), "--html: a page cannot show pictures inside tar shards"),
        (("--from-image", "x.png"), "--from-image: the picture holds its own prompt"),
    ],
)
def test_wrong_options_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    status, _, stderr = generate(capsys, model, tmp_path / "out", *options)
    assert (status, stderr.count("\n")) == (2, 1)
    assert message in stderr


def test_shards_need_a_seed_and_pictures_their_metadata(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*call, "a", "--shard", "1/2"]) == 2
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    (tmp_path / "p.jpg").write_bytes(b"no picture")
    for name in ("p.png", "p.jpg", "none.png"):
        assert main([*call, "--from-image", str(tmp_path / name)]) == 2
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "error: --shard: shards need the same seed; give one with --seed",
        f"error: {tmp_path / 'p.png'}: does not record how it was drawn; expected a `cascade generate` picture",
        f"error: {tmp_path / 'p.jpg'}: not a readable picture: cannot identify image file {str(tmp_path / 'p.jpg')!r}",
        f"error: {tmp_path / 'none.png'}: no such file",
    ]
