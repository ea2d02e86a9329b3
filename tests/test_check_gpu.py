"""scripts/check_gpu.sh on a CPU: for any behaviour of a check the table has its row, and the other checks run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from check_gpu import ALONE, RESULT, TOGETHER, Row, Running, all_rows, table

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_gpu.sh"


def saying(row: Row) -> str:
    """A program that prints the row as a check does."""
    return f"print('chatter'); print({RESULT + json.dumps(asdict(row))!r})"


CHECKS = {
    "good": saying(Row("a", True, "1 s")),
    "bad": saying(Row("b", False, "far")),
    "crashes": "raise ValueError('no such kernel')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "silent": "",
    "hangs": "import time; time.sleep(600)",
}


@pytest.mark.slow
def test_every_check_has_its_line_whatever_becomes_of_it(tmp_path: Path) -> None:
    start = time.monotonic()
    running = Running(lambda name: [sys.executable, "-c", CHECKS[name]], tmp_path, start + 10)
    rows = all_rows(running, [name for name in CHECKS if name != "hangs"], ["good", "hangs", "bad"])
    assert time.monotonic() - start < 60
    assert [(row.name, row.ok) for row in rows] == [
        ("a", True),
        ("b", False),
        ("crashes", False),
        ("killed", False),
        ("silent", False),
        ("a", True),
        ("hangs", False),
        ("bad", False),
    ]
    assert "ValueError: no such kernel" in rows[2].said
    assert "ended with -9" in rows[3].said
    assert "no output" in rows[4].said
    assert "not done in time" in rows[6].said
    assert rows[7].said == "not started: no time left"


def test_the_table_says_what_failed_and_what_was_left_out() -> None:
    rows = [Row("a", True, "1 s"), Row("b", False, "far"), Row("c", None, "needs a GPU")]
    assert table(rows).splitlines()[2:] == [
        "| a | good | 1 s |",
        "| b | FAILED | far |",
        "| c | left out | needs a GPU |",
    ]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_the_script_starts_its_checks_and_prints_their_rows(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--only", "fp16", "--only", "ddp", "--logs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "| fp16, 50 steps | left out | fp16 needs a GPU |",
        "| DDP over nccl | left out | nccl needs a GPU |",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"fp16.log", "ddp.log"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr == "Error: no GPU here; --device cpu shows that the script itself works\n"


@pytest.mark.slow
def test_all_that_a_cpu_can_take_is_good_on_a_cpu(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--seconds", "900", "--logs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert {path.stem for path in tmp_path.iterdir()} == {*TOGETHER, *ALONE}
