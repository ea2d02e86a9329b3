"""Patterns find the intended files, and cannot search a whole disk."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from cascade.errors import CascadeError
from cascade.files.paths import matching


@pytest.mark.parametrize("pattern", ["/**/*.parquet", "/**", "//**/a", "/*/**/a.tar", "/tmp/../**/a"])
def test_a_search_through_the_whole_disk_is_refused_before_it_begins(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glob, "glob", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(CascadeError, match="searches the whole disk; write the folder before"):
        matching(pattern)


def test_relative_patterns_are_searched_unless_they_begin_at_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert matching("**/*.tar") == [os.path.join("a", "b", "c.tar")]  # noqa: PTH118 - of what glob gives
    assert matching(f"{tmp_path}/**/c.tar") == [f"{tmp_path}/a/b/c.tar"]
    monkeypatch.chdir("/")
    with pytest.raises(CascadeError):
        matching("**/*.tar")
