"""Every reader gets files that nobody would write: it reads them, or refuses them in a line; see scripts/fuzz.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fuzz import fuzz
from fuzzing.targets import TARGETS, Target

CASES = 200
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pipes and links in a file's place, and alarms, are of POSIX"),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_nobody_would_write_is_read_or_refused_in_a_line(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    seed, cases = int(os.environ.get("FUZZ_SEED", "7")), max(1, CASES // target.cost)
    ground = fuzz(target, cases, seed, tmp_path / "ground")
    assert ground.cases >= cases
    assert not ground.known
