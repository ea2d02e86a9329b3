"""Standard output may be full or closed, and files have the permissions that the umask allows."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

from cascade.cli.program import main
from cascade.cli.terminal import say
from cascade.errors import StorageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="/dev/full, closed handles and the umask are of POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def shell(redirections: str) -> tuple[int, str]:
    """(status, standard error) of `cascade --version` in a shell, its streams redirected."""
    command = f"exec {sys.executable} -m cascade --version {redirections}"
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def test_a_full_output_is_one_line_and_a_closed_one_is_none() -> None:
    if Path("/dev/full").exists():
        full = "cascade: error: a file cannot be read or written: No space left on device\n"
        assert shell(">/dev/full") == (2, full)
        assert shell(">/dev/full 2>/dev/full") == (2, "")
    assert shell(">&-") == (0, "")
    assert shell(">/dev/null 2>&-") == (0, "")
    assert shell("<&- >&- 2>&-") == (0, "")


def test_a_result_that_cannot_be_printed_is_an_error_and_a_message_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:  # noqa: PTH123 (a device)
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", full)
        say("a message", error=True)
        with pytest.raises(StorageError, match="standard output: cannot be written: No space left on device"):
            say("a result")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what waits in the buffer goes somewhere


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_everything_in_an_output_folder_obeys_the_umask(model: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        call = [
            "generate",
            "a fox",
            "--model",
            str(model),
            "--device",
            "cpu",
            "--until",
            "16",
            "--seed",
            "1",
            "--quiet",
        ]
        assert main([*call, "--out", str(tmp_path / "out"), "--save-stages", "--html", "--grid", "--low-memory"]) == 0
    finally:
        os.umask(before)
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(made) > 8
    for path in made:
        allowed = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == allowed & ~mask, path


def test_a_flipped_bit_in_a_kept_smaller_picture_is_noticed_and_mended(model: Path, tmp_path: Path) -> None:
    call = [
        "generate",
        "a fox",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--until",
        "16",
        "--seed",
        "1",
        "--save-stages",
    ]
    call += ["--out", str(tmp_path / "out")]
    assert main(call) == 0
    (kept,) = (tmp_path / "out" / "stages").glob("*.png")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    assert main(call) == 0
    assert kept.read_bytes() == whole
    before = kept.stat().st_mtime_ns
    assert main(call) == 0
    assert kept.stat().st_mtime_ns == before


def test_the_page_of_a_run_that_was_interrupted_is_that_of_one_that_was_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.batch.output import Output

    prompts = [f"a fox in picture {number}" for number in range(4)]
    call = ["generate", *prompts, "--model", str(model), "--device", "cpu", "--until", "8", "--seed", "1", "--html"]
    call += ["--out", "out"]
    pages = []
    for place, fails_at in (("whole", None), ("broken", 2)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        write = Output.write

        def fail(output: Output, finished: object, fails_at: int | None = fails_at) -> object:
            if fails_at is not None and finished.entry["index"] == fails_at:  # type: ignore[attr-defined]
                raise OSError(5, "Input/output error")
            return write(output, finished)  # type: ignore[arg-type] # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(Output, "write", fail)
            assert main(call) == (0 if fails_at is None else 2)
        if fails_at is not None:
            (tmp_path / place / "out" / "index.html").unlink(missing_ok=True)
            assert main(call) == 0
        pages.append((tmp_path / place / "out" / "index.html").read_bytes())
    assert pages[0] == pages[1]
