"""Disks without locks, read-only home folders, one core: drawing works, with a warning about the limitation."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

from cascade import system
from cascade.cli.program import main
from cascade.files import locks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as NFS is without a lock daemon."""

    def unable(*_arguments: object, **_more: object) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    for name in ("lock", "unlock", "lock_byte", "unlock_byte"):
        monkeypatch.setattr(system, name, unable)
    monkeypatch.setattr(locks, "_warned", set())


@pytest.mark.usefixtures("no_locks")
def test_where_there_are_no_locks_pictures_are_drawn_and_one_line_says_what_is_lost(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with caplog.at_level(logging.WARNING, "cascade.files"):
        assert main(["generate", "--model", str(model), "--out", str(out), "a", "b", "--quiet"]) == 0
    assert len(list(out.glob("*.png"))) == 2
    lost = [line for line in caplog.messages if "no locks on this file system" in line]
    assert 1 <= len(lost) == len(set(lost)) <= 2  # of the folder, and of the one with what a restart needs
    assert all(line.endswith("make sure no other run writes into this folder") for line in lost)


@pytest.mark.usefixtures("no_locks")
def test_several_processes_cannot_share_the_work_without_locks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--model", str(model), "--out", str(tmp_path / "out"), "a", "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "no locks on this file system, which 2 processes need to share work" in said
    assert "--shard" in said


def test_a_home_that_is_not_there_is_done_without(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    home = str(tmp_path / "file" / "home")
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= {"HOME": home, "USERPROFILE": home, "LOCALAPPDATA": home}
    command = ["generate", "--model", str(model), "--out", "out", "--dtype", "auto", "a"]
    done = subprocess.run(
        [sys.executable, "-m", "cascade", *command],
        env=environment, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
