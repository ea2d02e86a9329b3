"""A folder is walked completely, once, and files that are not data are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade.files.paths import is_hidden, walk


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in walk(folder).files]


def test_what_systems_and_editors_leave_is_passed_over(tmp_path: Path) -> None:
    data = tmp_path / ".hidden" / "data"  # itself may be hidden
    files(data, "a.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", ".Trash-1000/files/b.png", "b/.DS_Store")
    assert found(data) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "hidden"), [("./a.png", False), ("../a.png", False), ("a/.b/c", True), ("a/._b", True), ("...", True)]
)
def test_a_dot_at_the_beginning_of_any_part_hides(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_links_to_folders_are_followed_once_and_circles_end(tmp_path: Path) -> None:
    data = tmp_path / "data"
    files(data, "b/1.png", "z/2.png")
    files(tmp_path / "far", "3.png", "deep/4.png")
    for name, target in {"a": "b", "b/up": "..", "far": "../far", "far-again": "../far/deep", "z/z": "."}.items():
        (data / name).symlink_to(target)
    (tmp_path / "far" / "back").symlink_to(data)
    # Under their own names where those lie below, although `a` comes before `b`.
    assert found(data) == ["b/1.png", "far/3.png", "far/deep/4.png", "z/2.png"]
    assert walk(data).problems == []


def test_links_to_files_are_files(tmp_path: Path) -> None:
    files(tmp_path / "blobs", "0123")
    files(tmp_path / "data", "a.png")
    (tmp_path / "data" / "b.png").symlink_to("../blobs/0123")
    assert found(tmp_path / "data") == ["a.png", "b.png"]


def test_what_cannot_be_read_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    real = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "closed":  # root may enter what nobody may
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(tmp_path) == ["a.png"]
    assert sorted(line.removeprefix(f"{tmp_path}/") for line in walk(tmp_path).problems) == [
        "circle.png: cannot be read: Too many levels of symbolic links",
        "closed: cannot be read: Permission denied",
        "gone.png: cannot be read: a broken link",
        "pipe.png: cannot be read: not a file",
    ]


def test_a_folder_that_is_none_is_the_callers_to_tell(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        walk(tmp_path / "none")
    files(tmp_path, "a.png")
    with pytest.raises(NotADirectoryError):
        walk(tmp_path / "a.png")
