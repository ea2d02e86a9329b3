"""Each call about a file fails once, in turn: one line, nothing finished is lost, and the same command goes on.

The fast suite tries two places of drawing and one of training, `pytest -m slow` forty; FAULTS=every, for the night,
each one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from helpers_faults import COMPILER, ERRORS, Ended, Fault, Server, fault_server
from helpers_model import make_tiny_cascade
from helpers_training import micro_config

from cascade.settings import to_yaml

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the library that lets calls fail needs a C compiler on Linux")
FEW, MANY = 2, 40
"""Places that the fast suite and the slow tests try of each drawing."""
EVERY = os.environ.get("FAULTS") == "every"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    with fault_server(folder) as running:
        running.warm(generate(model, folder / "warm"))
        yield running


def places(calls: int, count: int, seed: int) -> list[int]:
    """Which calls fail, counted from 1: as many by a seed, or every one."""
    return sorted(random.Random(seed).sample(range(1, calls + 1), calls if EVERY else min(count, calls)))


def assert_told(ended: Ended) -> None:
    """It went well, some failed, or one line says why not; and nothing of Python's."""
    assert ended.status in (0, 1, 2), ended
    assert "Traceback" not in ended.stderr, ended
    if ended.status == 2:
        assert sum("error: " in line for line in ended.stderr.splitlines()) == 1, ended


# --- drawing -----------------------------------------------------------------------------------------------

PROMPTS = ["a fox", "a cat", "a dog"]
WAYS: dict[str, tuple[str, ...]] = {
    "folder": ("--html", "--grid", "--save-stages"),
    "webdataset": ("--format", "webdataset", "--tar-size", "2"),
    "low-memory": ("--low-memory", "--until", "16"),
}


def generate(model: Path, out: Path, *more: object) -> Sequence[object]:
    options = ("--model", model, "--out", out, "--device", "cpu", "--until", 8, "--seed", 3)
    return ("generate", *PROMPTS, *options, *more)


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def content(out: Path, name: str) -> bytes | None:
    """A picture's bytes, whether packed or waiting to be."""
    import tarfile

    tar, _, member = name.rpartition("/")
    for path in (out / name, out / ".cascade" / "spool" / name):
        if path.is_file():
            return path.read_bytes()
    if tar.endswith(".tar") and (out / tar).is_file():
        with tarfile.open(out / tar) as file:
            found = file.extractfile(member)
            return found.read() if found else None
    return None


def assert_every_line_has_its_picture(out: Path, ended: Ended) -> None:
    for line in lines(out):
        held = content(out, line["file"])
        assert held is not None, f"{line['file']} is gone, its line stands\n{ended}"
        assert sha256(held).hexdigest() == line["sha256"], f"{line['file']}\n{ended}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """All that a run made, but its locks and what it may know of its own past."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: b"" if name == "manifest.jsonl" else path.read_bytes()
        for name, path in found.items()
        if not name.startswith(".cascade")
    }


def fail_drawing(
    server: Server, model: Path, folder: Path, way: str, start: str, count: int, error: int = errno.EIO
) -> None:
    """Draw into a new folder, one that is finished, or one whose run is to go, with a failure in each place."""
    out, whole, old = folder / "out", folder / "whole", folder / "old"
    changes = () if start == "continue" else ("--seed", 4)
    overwrite = ("--overwrite",) if start == "overwrite" else ()
    command = generate(model, out, *WAYS[way], *changes)
    assert server.run(generate(model, old, *WAYS[way]), Fault(str(old))).status == 0
    assert server.run(generate(model, whole, *WAYS[way], *changes), Fault(str(whole))).status == 0
    expected = {**snapshot(whole), "run.json": (whole / "run.json").read_bytes()}
    if "index.html" in expected:
        expected["index.html"] = expected["index.html"].replace(b"whole", b"out")

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if start != "new":
            shutil.copytree(old, out)
            for name in ("index.html",):
                if (out / name).exists():
                    (out / name).write_text((out / name).read_text().replace("old", "out"))

    begin()
    calls = server.run([*command, *overwrite], Fault(str(out))).calls
    for place in places(calls, count, seed=7):
        begin()
        ended = server.run([*command, *overwrite], Fault(str(out), place, place, error))
        assert_told(ended)
        assert_every_line_has_its_picture(out, ended)
        if start == "continue":
            assert {line["id"] for line in lines(out)} == {line["id"] for line in lines(old)}, ended
        again = server.run([*command, *overwrite], Fault(str(out)))
        assert again.status == 0, f"{ended}\nthen {again}"
        assert snapshot(out) == expected, f"{ended}\nthen {again}"


@pytest.mark.parametrize(("way", "start"), [("folder", "overwrite"), ("webdataset", "new"), ("low-memory", "continue")])
def test_a_call_that_fails_loses_no_picture(server: Server, model: Path, tmp_path: Path, way: str, start: str) -> None:
    fail_drawing(server, model, tmp_path, way, start, count=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("start", ["new", "continue", "overwrite"])
@pytest.mark.parametrize("way", WAYS)
def test_no_call_that_fails_loses_a_picture(
    server: Server, model: Path, tmp_path: Path, way: str, start: str, error: int
) -> None:
    fail_drawing(server, model, tmp_path, way, start, count=MANY, error=error)


# --- training ----------------------------------------------------------------------------------------------

TRAINING = ("training.save_every=1", "training.keep_checkpoints=2", "training.sample_every=3", "training.log_every=1")


def train(folder: Path, out: Path, steps: int, *more: str) -> Sequence[object]:
    config = micro_config(out, *TRAINING, "training.sample_prompts=[red]", f"training.steps={steps}")
    settings = folder / f"{out.name}-{steps}.yaml"
    settings.write_text(to_yaml(config))
    return ("train", settings, *more)


def stage_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "stage").iterdir()}


def fail_training(server: Server, folder: Path, count: int, error: int = errno.EIO) -> None:
    """Go on from step 3 to step 5, with a failure in each place; what was saved before is there after it."""
    out, old, whole = folder / "out", folder / "old", folder / "whole"
    assert server.run(train(folder, old, 5, "training.steps=3"), Fault(str(old))).status == 0
    shutil.copytree(old, whole)
    shutil.copytree(old, out)
    assert server.run(train(folder, whole, 5, "--resume"), Fault(str(whole))).status == 0
    expected = stage_of(whole)
    calls = server.run(train(folder, out, 5, "--resume"), Fault(str(out))).calls
    for place in places(calls, count, seed=5):
        shutil.rmtree(out)
        shutil.copytree(old, out)
        ended = server.run(train(folder, out, 5, "--resume"), Fault(str(out), place, place, error))
        assert_told(ended)
        again = server.run(train(folder, out, 5, "--resume"), Fault(str(out)))
        assert again.status == 0, f"{ended}\nthen {again}"
        assert stage_of(out) == expected, ended
        names = {str(path.relative_to(out)) for path in out.rglob("*")}
        assert names == {str(path.relative_to(whole)) for path in whole.rglob("*")}, ended


def test_a_call_that_fails_ends_training_with_one_line_and_it_goes_on(server: Server, tmp_path: Path) -> None:
    fail_training(server, tmp_path, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_no_call_that_fails_loses_what_training_saved(server: Server, tmp_path: Path, error: int) -> None:
    fail_training(server, tmp_path, count=MANY, error=error)
