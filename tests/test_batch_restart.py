"""Runs that are killed at any moment, restarted or split together give the output of one uninterrupted run."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import make_tiny_cascade

import cascade
from cascade.cli.program import main

PROMPTS = 24
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines with and without ids and seeds, several pictures, other settings, doubles, and one that is bad."""
    lines: list[Any] = [f"a fox in picture {number}" for number in range(PROMPTS - 6)]
    lines += ["a fox in picture 0", {"prompt": "ключ 🦊", "id": "key", "num_images": 3}, {"prompt": "a", "steps": 1}]
    lines += [{"sed": 3}, {"prompt": "a star", "seed": 5, "guidance": 1.0}, {"prompt": "last"}]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def call(model: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    options = ["--model", model, "--prompts", prompts, "--out", out, "--seed", 3, "--device", "cpu", *more]
    return ["generate", *map(str, options)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    return (main(arguments), *capsys.readouterr())


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The manifest, or those of all shards, sorted by id and without times."""
    lines = [json.loads(line) for path in out.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return sorted(lines, key=lambda line: (line["id"], line["number"]))


def contents(out: Path) -> dict[str, bytes]:
    """All pictures and tars."""
    kinds = (".png", ".webp", ".jpg", ".tar")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.suffix in kinds and ".cascade" not in path.parts
    }


def assert_same(out: Path, expected: Path) -> None:
    assert lines_of(out) == lines_of(expected)
    assert contents(out) == contents(expected)
    assert not list(out.glob(".[!c]*"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bytes belong to a thread count: what is drawn here has the one thread that `environment` gives the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(call(model, prompts, out, "--quiet")) == 1
    assert len(lines_of(out)) == PROMPTS - 1 + 2
    return out


def test_the_same_command_again_draws_nothing_and_says_what_is_there(
    model: Path, prompts: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.drawing.engine.draw_batch", None)
    status, stdout, stderr = run(capsys, *call(model, prompts, whole))
    assert (status, stdout) == (1, f"25 pictures in {whole}, 25 of them from an earlier run, 1 failed\n")
    assert stderr == f"{prompts}:22: 'sed' is not a column; did you mean seed?\n"


def test_damaged_and_missing_pictures_and_torn_lines_are_redone_and_others_kept(
    model: Path, prompts: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *call(model, prompts, out))[0] == 1
    pictures = sorted(out.glob("*.png"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:50])
    pictures[7].unlink()
    manifest = out / "manifest.jsonl"
    *kept, last = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(kept) + last[: len(last) // 2])
    before = pictures[0].stat().st_mtime_ns
    status, stdout, _ = run(capsys, *call(model, prompts, out))
    assert (status, stdout) == (1, f"25 pictures in {out}, 22 of them from an earlier run, 1 failed\n")
    assert_same(out, whole)
    assert pictures[0].stat().st_mtime_ns == before
    assert manifest.read_text().count("\n") == 25


EXTRAS = ("grid.png", "index.html", "manifest.parquet")


def test_other_settings_are_refused_by_name_unless_told_to_overwrite(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, *call(model, prompts, out, "--until", 8, "--grid", "--html", "--manifest", "parquet"))[0] == 1
    before = lines_of(out)
    assert set(EXTRAS) <= {path.name for path in out.iterdir()}
    status, _, stderr = run(capsys, *call(model, prompts, out, "--until", 16, "--steps", "base=1"))
    assert status == 2
    assert 'other settings (steps was not given, is {"base": 1}; until was 8, is 16); use the same' in stderr
    assert lines_of(out) == before
    assert run(capsys, *call(model, prompts, out, "--until", 16, "--format", "jpeg", "--overwrite"))[0] == 1
    assert {line["settings"]["height"] for line in lines_of(out)} == {16}
    assert set(contents(out)) == {line["file"] for line in lines_of(out)}
    assert not set(EXTRAS) & {path.name for path in out.iterdir()}  # they showed what is no more


def test_another_prompt_in_the_place_of_a_drawn_one_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("a fox\n")
    assert run(capsys, *call(model, file, out, "--until", 8))[0] == 0
    file.write_text("a fox\na star\n")
    assert run(capsys, *call(model, file, out, "--until", 8))[1].startswith("2 pictures")
    file.write_text("a wolf\na star\n")
    status, _, stderr = run(capsys, *call(model, file, out, "--until", 8))
    assert status == 2
    assert "000000-a-fox.png was drawn from another prompt" in stderr


def test_a_seed_that_was_drawn_holds_for_the_run_that_continues(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a fox", "--model", str(model), "--out", str(tmp_path / "out"), "--until", "8"]
    first, second = run(capsys, *command)[1], run(capsys, *command)[1]
    assert first.splitlines()[0] == second.splitlines()[0]
    assert "1 of them from an earlier run" in second


@pytest.mark.parametrize("options", [("--window", 7), ("--low-memory", "--window", 5), ("--low-memory",)])
def test_windows_change_no_output(
    model: Path, prompts: Path, whole: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    assert main(call(model, prompts, tmp_path / "out", "--quiet", *options)) == 1
    assert_same(tmp_path / "out", whole)
    assert not (tmp_path / "out" / ".cascade" / "shelf").exists()


@pytest.mark.parametrize("count", [2, 5, 16])
def test_shards_that_share_nothing_give_the_output_of_one_run(
    model: Path, prompts: Path, whole: Path, tmp_path: Path, count: int
) -> None:
    statuses = [
        main(call(model, prompts, tmp_path / "out", "--quiet", "--shard", f"{which}/{count}"))
        for which in range(1, count + 1)
    ]
    assert sum(statuses) == 1  # the bad line belongs to one of them
    assert len(list((tmp_path / "out").glob("manifest-*-of-*.jsonl"))) == count
    assert_same(tmp_path / "out", whole)


@pytest.fixture(scope="module")
def whole_tars(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tars") / "out"
    assert main(call(model, prompts, out, "--quiet", *TARS)) == 1
    return out


TARS = ("--format", "webdataset", "--tar-size", 5)


def test_tar_shards_hold_whole_samples_by_index(whole: Path, whole_tars: Path) -> None:
    assert sorted(contents(whole_tars)) == [f"{number:06d}.tar" for number in range(5)]
    pictures = {}
    for name, content in contents(whole_tars).items():
        with tarfile.open(fileobj=io.BytesIO(content)) as file:
            members = file.getmembers()
            pictures |= {m.name: file.extractfile(m).read() for m in members if m.name.endswith(".png")}  # type: ignore[union-attr]
        assert {member.mtime for member in members} == {0}
        assert {int(member.name[:6]) // 5 for member in members} == {int(name[:6])}
        keys = [member.name.partition(".")[0] for member in members]
        assert keys == [key for key in dict.fromkeys(keys) for _ in range(3)]  # png, json and txt stand together
    assert pictures == contents(whole)


def test_a_picture_out_of_a_tar_is_drawn_again_to_the_same_bytes(
    model: Path, whole_tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(whole_tars / "000001.tar") as file:
        name = next(member.name for member in file.getmembers() if member.name.endswith(".png"))
        (tmp_path / name).write_bytes(file.extractfile(name).read())  # type: ignore[union-attr]
    call_again = ["--from-image", str(tmp_path / name), "--model", str(model), "--out", str(tmp_path / "again")]
    assert run(capsys, "generate", *call_again)[:2] == (0, f"{tmp_path / 'again' / name}: the same bytes\n")


def test_a_damaged_tar_is_mended_and_a_missing_one_drawn_again(
    model: Path, prompts: Path, whole_tars: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(call(model, prompts, out, "--quiet", *TARS)) == 1
    damaged = bytearray((out / "000001.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (out / "000001.tar").write_bytes(damaged)
    (out / "000003.tar").unlink()
    (out / "000004.tar").write_bytes((out / "000004.tar").read_bytes()[:3000])
    assert main(call(model, prompts, out, "--quiet", *TARS)) == 1
    assert_same(out, whole_tars)


def test_tars_in_shards_are_those_of_one_run(model: Path, prompts: Path, whole_tars: Path, tmp_path: Path) -> None:
    for which in (1, 2):
        main(call(model, prompts, tmp_path / "out", "--quiet", *TARS, "--shard", f"{which}/2"))
    assert_same(tmp_path / "out", whole_tars)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_a_picture_is_drawn_again_to_the_same_bytes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    lines = [
        {"prompt": "ключ 🦊 ", "num_images": 2, "negative_prompt": "dull"},
        "long " * 20_000,
        {"prompt": "a", "steps": 1},
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a long prompt is cut, with a warning
        assert (
            run(
                capsys,
                *call(model, prompts, out, "--format", format, "--batch-size", 2, "--until", 16, "--save-stages"),
            )[0]
            == 0
        )
        smaller = [name for line in lines_of(out) for name in line["stages"].values()]
        assert len(smaller) == 4
        for file in (*(line["file"] for line in lines_of(out)), smaller[1]):
            again = tmp_path / "again" / Path(file).name
            call_again = ["--from-image", str(out / file), "--model", str(model), "--out", str(again.parent)]
            assert run(capsys, "generate", *call_again)[:2] == (0, f"{again}: the same bytes\n")
            assert again.read_bytes() == (out / file).read_bytes()


def test_a_smaller_picture_that_is_gone_is_drawn_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("a\nb\n")
    command = call(model, file, out, "--until", 16, "--save-stages")
    assert run(capsys, *command)[0] == 0
    before = contents(out)
    next((out / "stages").rglob("*.png")).unlink()
    assert run(capsys, *command)[1] == f"2 pictures in {out}, 1 of them from an earlier run\n"
    assert contents(out) == before


# --- killed ------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    here = str(Path(cascade.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group at once: of a launch, launcher and processes."""
    with suppress(ProcessLookupError):  # it was done already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Until something is reached, or the process is done."""
    while process.poll() is None:
        with suppress(FileNotFoundError):  # a folder went while it was looked into
            if reached():
                return
        time.sleep(0.001)


def finish_after_kills(
    command: list[str], moments: Sequence[Callable[[], bool]], seed: int, killed: Callable[[], object] = lambda: None
) -> int:
    """Kill the command soon after each of `moments`, then let it finish. Kills that came in time.

    killed: called after each kill.
    """
    rng, hits = random.Random(seed), 0
    for moment in moments:
        process = start(command)
        wait_for(process, moment)
        time.sleep(rng.uniform(0, 0.05))
        hits += process.poll() is None
        kill(process)
        killed()
    assert start(command).wait(timeout=300) in (0, 1)
    return hits


def spread(out: Path, kills: int) -> list[Callable[[], bool]]:
    """Moments spread over the pictures: when the manifest has so many lines."""
    manifest = out / "manifest.jsonl"
    counts = [(number + 1) * PROMPTS // (kills + 1) for number in range(kills)]
    return [
        lambda count=count: manifest.exists() and manifest.read_bytes().count(b"\n") >= count  # type: ignore[misc]
        for count in counts
    ]


CASCADE = [sys.executable, "-m", "cascade"]


@pytest.mark.slow
def test_twenty_kills_change_nothing(model: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hits = finish_after_kills([*CASCADE, *call(model, prompts, out)], spread(out, 20), seed=0)
    assert hits >= 15
    assert_same(out, whole)


@pytest.mark.slow
def test_kills_within_tar_shards_change_nothing(model: Path, prompts: Path, whole_tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hits = finish_after_kills([*CASCADE, *call(model, prompts, out, *TARS)], spread(out, 3), seed=1)
    assert hits == 3
    assert_same(out, whole_tars)


@pytest.mark.slow
def test_kills_while_smaller_pictures_wait_on_the_disk_change_nothing(
    model: Path, prompts: Path, whole: Path, tmp_path: Path
) -> None:
    """With `--low-memory`, while the base stage draws, while the next one does, and while the last one does."""
    out = tmp_path / "out"
    command = [*CASCADE, *call(model, prompts, out, "--low-memory", "--window", PROMPTS)]
    left: list[int] = []

    def waiting() -> int:
        return len(list((out / ".cascade" / "shelf").glob("*.npy")))

    moments = [lambda: waiting() >= 3, lambda: waiting() >= PROMPTS + 6, lambda: len(contents(out)) >= 3]
    hits = finish_after_kills(command, moments, seed=3, killed=lambda: left.append(waiting()))
    assert hits == 3
    assert 0 < left[0] < left[1] <= left[2]
    assert_same(out, whole)
    assert waiting() == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), TARS], ids=["folder", "tars"])
def test_two_processes_and_three_kills_change_nothing(
    model: Path, prompts: Path, whole: Path, whole_tars: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    log.mkdir()
    script = tmp_path / "run.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "from cascade.batch.output import Output\n"
        "from cascade.cli.program import main\n"
        "begin, write = Output.begin, Output.write\n"
        "def begun(self, *arguments, **options):\n"  # on a busy machine, one process may find nothing left to draw
        f"    pathlib.Path({str(log)!r}, f'{{self.team.rank}}-of-{{self.team.count}}').touch()\n"
        "    return begin(self, *arguments, **options)\n"
        "def written(self, *arguments):\n"
        "    time.sleep(0.1)\n"  # so that a kill finds it at work
        "    return write(self, *arguments)\n"
        "Output.begin, Output.write = begun, written\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [*LAUNCH, str(script), *call(model, prompts, out, *options)]
    assert finish_after_kills(command, spread(out, 3), seed=2) == 3
    assert {path.name for path in log.iterdir()} == {"0-of-2", "1-of-2"}
    assert_same(out, whole_tars if options else whole)
