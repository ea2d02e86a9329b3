"""Errors that a program can act on have their own type; a command prints each in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade

from cascade import CascadeError, CascadePipeline, DownloadError, ShortageError, StorageError
from cascade.files.atomic import write_text


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"), device="cpu")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        write_text(tmp_path / "file" / "text.txt", "a")


def test_too_little_memory_is_a_shortage(pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.drawing.slots.free_bytes", lambda _device: 1000)
    with pytest.raises(ShortageError, match="out of memory in stage base"):
        pipeline("a fox")


def test_a_model_that_no_hub_gives_is_a_download_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="nobody/nothing"):
        CascadePipeline.from_pretrained("nobody/nothing")


def test_a_wrong_argument_is_none_of_them(pipeline: CascadePipeline) -> None:
    with pytest.raises(CascadeError) as caught:
        pipeline("a fox", seed=-1)
    assert type(caught.value) is CascadeError
