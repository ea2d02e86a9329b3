"""Pictures decoded once give the same views as before, to any number of processes, until they change."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_data import write_folder, write_parquet, write_tar

from cascade.config.data import DataConfig, FolderSource, ParquetSource, ScenesSource, WebDatasetSource
from cascade.config.stage import StageConfig
from cascade.data import decoded as module
from cascade.data.decoded import DecodedRecords
from cascade.data.loader import Batch, Views, batches
from cascade.errors import CascadeError

STAGE = StageConfig(name="base", resolution=8)
LARGE = StageConfig(name="sr", resolution=16, low_resolution=8)


def pictures(folder: Path, count: int = 12) -> Path:
    """Pictures of many sizes and shapes, one broken and one a strip."""
    folder.mkdir()
    for number in range(count):
        noise = Image.effect_noise((9 + 3 * number, 30 - 2 * number), 80)
        Image.merge("RGB", (noise, noise.rotate(180), noise)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}\nthe {number}th\n")
    (folder / "03.png").write_bytes(b"no picture")
    Image.new("RGB", (400, 4)).save(folder / "04.png")
    return folder


def config(source: Any, decoded: Path | None, **changes: Any) -> DataConfig:
    where = None if decoded is None else str(decoded)
    return DataConfig(sources=(source, ScenesSource()), decoded=where, max_bad_share=1.0, **changes)


def taken(data: DataConfig, stage: StageConfig, count: int = 8) -> Sequence[Batch]:
    with closing(batches(data, stage, 0, batch_size=6)) as stream:
        return list(itertools.islice(stream, count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("stage", "changes"), [(STAGE, {"flip": 0.5}), (STAGE, {"aspect": "crop"}), (LARGE, {"crop": 8, "flip": 0.5})]
)
def test_the_views_are_the_same_in_every_bit(
    tmp_path: Path, stage: StageConfig, changes: dict[str, Any], workers: int
) -> None:
    source = FolderSource(path=str(pictures(tmp_path / "pictures")))
    plain = taken(config(source, None, **changes), stage)
    once = taken(config(source, tmp_path / "decoded", workers=workers, **changes), stage)
    again = taken(config(source, tmp_path / "decoded", workers=workers, **changes), stage)
    for a, b, c in zip(plain, once, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.images, c.images)
        assert a.captions == b.captions == c.captions


def test_nothing_is_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = config(FolderSource(path=str(pictures(tmp_path / "pictures"))), tmp_path / "decoded")
    Views(data, STAGE, 0)
    monkeypatch.setattr(module, "decode", None)
    assert len(Views(data, STAGE, 1)[0].image) == 3


def test_a_source_that_changed_is_decoded_anew(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 4)
    data = config(FolderSource(path=str(folder)), tmp_path / "decoded")
    before = {view.caption for view in map(Views(data, STAGE, 0).__getitem__, range(20))}
    (folder / "000.txt").write_text("something else\n")
    after = {view.caption for view in map(Views(data, STAGE, 0).__getitem__, range(20))}
    assert "picture 0" in before - after
    assert "something else" in after - before
    assert len(list((tmp_path / "decoded").glob("*.pixels"))) == 1


def test_every_kind_of_source_that_ends_is_decoded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "one.parquet", 0, 5)
    write_tar(tmp_path / "one.tar", 0, 5)
    for number, source in enumerate(
        (
            ParquetSource(files=(str(tmp_path / "one.parquet"),), caption_column="captions"),
            WebDatasetSource(files=(str(tmp_path / "one.tar"),)),
        )
    ):
        folder = tmp_path / str(number)
        plain, stored = taken(config(source, None), STAGE), taken(config(source, folder), STAGE)
        assert all(torch.equal(a.images, b.images) for a, b in zip(plain, stored, strict=True))
        assert len(list(folder.glob("*.pixels"))) == 1


def test_processes_map_the_same_file(tmp_path: Path) -> None:
    """What travels to another process are names."""
    Views(config(FolderSource(path=str(pictures(tmp_path / "pictures"))), tmp_path / "decoded"), STAGE, 0)
    (said,) = (tmp_path / "decoded").glob("*.json")
    records = DecodedRecords(tmp_path / "decoded", said.stem)
    travelled = pickle.loads(pickle.dumps(records))
    assert len(pickle.dumps(records)) < 1000
    assert torch.equal(travelled[0].image, records[0].image)


def test_a_making_that_was_killed_is_made_anew(tmp_path: Path) -> None:
    data = config(FolderSource(path=str(pictures(tmp_path / "pictures"))), tmp_path / "decoded")
    expected = Views(data, STAGE, 0)[0].image
    (said,) = (tmp_path / "decoded").glob("*.json")
    said.unlink()  # it is written last
    said.with_suffix(".pixels").write_bytes(b"half")
    assert torch.equal(Views(data, STAGE, 0)[0].image, expected)


def test_a_file_of_another_size_and_a_full_disk_are_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = config(FolderSource(path=str(pictures(tmp_path / "pictures"))), tmp_path / "decoded")
    Views(data, STAGE, 0)
    (stored,) = (tmp_path / "decoded").glob("*.pixels")
    stored.write_bytes(b"half")
    with pytest.raises(CascadeError, match=r"its size differs from .*; delete"):
        Views(data, STAGE, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 100}))
    with pytest.raises(CascadeError, match=r"data.decoded: 12 pictures of 8 px take .* name another folder"):
        Views(config(data.sources[0], tmp_path / "other"), STAGE, 0)


@pytest.mark.parametrize("changes", [{"jitter": 0.1}, {"tiles": True, "crop": 8}])
def test_what_needs_the_pictures_as_they_are_refuses_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decoded stores pictures at one size"):
        config(FolderSource(path="pictures"), tmp_path, **changes)
