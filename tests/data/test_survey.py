"""The counts of a data survey, and its sheet of the network's inputs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_data import encoded, plain_picture, write_folder, write_parquet, write_tar

from cascade.config.data import (
    DataConfig,
    FolderSource,
    HubSource,
    ParquetSource,
    ScenesSource,
    SourceConfig,
    WebDatasetSource,
)
from cascade.config.stage import StageConfig
from cascade.data.loader import Views
from cascade.data.survey import Survey, survey, view_sheet


def looked_at(source: SourceConfig, stage: StageConfig, limit: int | None, **options: object) -> Survey:
    return survey(source, DataConfig(sources=(source,), **options), stage, limit)


@pytest.fixture
def flawed(tmp_path: Path) -> FolderSource:
    """Twelve pictures: one broken, one silent, two the same, one larger."""
    write_folder(tmp_path, 12, broken=(3,), silent=(5,))
    (tmp_path / "008.png").write_bytes(encoded(plain_picture(1)))
    (tmp_path / "009.png").write_bytes(encoded(plain_picture(9, size=40)))
    (tmp_path / "011.txt").write_text("picture 2\nanother")
    return FolderSource(path=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_that_is_wrong_is_found_and_named(flawed: FolderSource, stage: StageConfig, workers: int) -> None:
    found = looked_at(flawed, stage, None, workers=workers)
    assert (found.total, found.looked_at) == (12, 12)
    broken, silent = found.problems
    assert "003.png: broken picture" in broken
    assert silent.endswith("005.png: no caption")
    assert [(Path(copy).name, Path(first).name) for copy, first in found.copies] == [("008.png", "001.png")]
    assert sorted(found.sizes) == [(8, 8)] * 10 + [(40, 40)]
    # The broken picture's caption counts: it is encoded, too.
    assert found.captions["picture 2"] == 2
    assert len(found.captions) == 11


def test_what_lies_in_a_folder_and_cannot_be_read_is_a_problem(flawed: FolderSource, stage: StageConfig) -> None:
    Path(flawed.path, "gone").symlink_to("nowhere")
    assert looked_at(flawed, stage, 1).problems[-1] == f"{flawed.path}/gone: cannot be read: a broken link"


def test_a_limit_spreads_over_all_records(tmp_path: Path, stage: StageConfig) -> None:
    write_parquet(tmp_path / "rows.parquet", 0, 30)
    found = looked_at(ParquetSource(files=(str(tmp_path / "rows.parquet"),)), stage, 3)
    assert (found.total, found.looked_at) == (30, 3)
    assert list(found.captions) == ["picture 0", "picture 10", "picture 20"]


def test_every_kind_of_source_can_be_looked_at(tmp_path: Path, stage: StageConfig) -> None:
    write_parquet(tmp_path / "hub" / "train.parquet", 0, 5)
    write_tar(tmp_path / "0.tar", 0, 5)
    sources: list[tuple[SourceConfig, int | None]] = [
        (HubSource(name=str(tmp_path / "hub")), 5),
        (HubSource(name=str(tmp_path / "hub"), streaming=True), None),
        (WebDatasetSource(files=(str(tmp_path / "0.tar"),)), 5),
        (ScenesSource(), None),
    ]
    for source, total in sources:
        found = looked_at(source, stage, 4)
        assert (found.total, found.looked_at, found.problems) == (total, 4, [])


def test_equal_bytes_of_another_shape_are_no_copy(tmp_path: Path, stage: StageConfig) -> None:
    for name, size in (("a", (8, 2)), ("b", (2, 8)), ("c", (4, 4))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    assert looked_at(FolderSource(path=str(tmp_path)), stage, None).copies == []


@pytest.mark.parametrize("workers", [0, 1])
def test_what_training_passes_over_is_bad(tmp_path: Path, workers: int) -> None:
    """A strip, a tile below the crop, a smaller picture that is broken or has another size."""
    upscaler = StageConfig(name="upscaler", resolution=8, low_resolution=4)
    sizes = {"strip": (21, 1), "square": (8, 8), "tile": (4, 8)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    folder = FolderSource(path=str(tmp_path))
    (strip,) = looked_at(folder, upscaler, None, workers=workers).problems
    assert "strip.png: a strip of 21x1" in strip
    assert looked_at(folder, upscaler, None, workers=workers, aspect="crop").problems == []
    small, narrow = looked_at(folder, upscaler, None, workers=workers, crop=6, tiles=True, aspect="crop").problems
    assert "strip.png: the tile of 21x1 is smaller than data.crop 6" in small
    assert "tile.png: the tile of 4x8" in narrow

    lows = [encoded(plain_picture(0, size)) for size in (4, 5)] + [b"broken", None]
    table = {"image": [encoded(plain_picture(number)) for number in range(4)], "caption": list("abcd"), "low": lows}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = ParquetSource(files=(str(tmp_path / "a.parquet"),), low_column="low")
    other_size, broken = looked_at(source, upscaler, None, workers=workers).problems
    assert "row 1: its smaller picture has 5x5" in other_size
    assert "row 2: broken picture" in broken


def test_the_sheet_shows_the_views_of_the_run(flawed: FolderSource, stage: StageConfig) -> None:
    data = DataConfig(sources=(flawed,), max_bad_share=1.0, flip=0.5)
    sheet = np.asarray(view_sheet(data, stage, 7, 2))
    views = Views(data, stage, 7)
    for number in range(2):
        picture = np.asarray(views[number].image.permute(1, 2, 0))
        cell = sheet[:192, 196 * number :][:192, :192]
        assert (cell[::24, ::24] == picture).all(), "enlarged 24 times by repeating pixels"


def test_for_super_resolution_the_sheet_has_the_mean_of_the_crop_beside_it(tmp_path: Path, stage: StageConfig) -> None:
    ramp = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(ramp).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a ramp")
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),), crop=4)
    large = stage.model_copy(update={"low_resolution": 4})
    sheet = np.asarray(view_sheet(data, large, 0, 1))
    low, high = sheet[:192, :192][::96, ::96], sheet[:192, 196:388][::48, ::48]
    assert (low.shape, high.shape) == ((2, 2, 3), (4, 4, 3))
    assert np.abs(high.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)) - low).max() <= 1, "the area mean, rounded"


def test_the_sheet_shows_the_smaller_picture_that_a_record_brings(tmp_path: Path) -> None:
    table = {"image": [encoded(plain_picture(0))], "caption": ["a"], "low": [encoded(plain_picture(200, size=4))]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = ParquetSource(files=(str(tmp_path / "a.parquet"),), low_column="low")
    upscaler = StageConfig(name="upscaler", resolution=8, low_resolution=4)
    sheet = np.asarray(view_sheet(DataConfig(sources=(source,)), upscaler, 0, 1))
    assert tuple(sheet[0, 0]) == plain_picture(200).getpixel((0, 0))
    assert tuple(sheet[0, 196]) == plain_picture(0).getpixel((0, 0))


def test_the_sheet_asks_how_captions_are_read(flawed: FolderSource, stage: StageConfig) -> None:
    asked: list[str] = []
    data = DataConfig(sources=(flawed,), max_bad_share=1.0, caption_dropout=0.0)
    view_sheet(data, stage, 7, 3, lambda caption: asked.append(caption) or caption)
    assert asked == [Views(data, stage, 7)[number].caption for number in range(3)]


def test_captions_that_are_all_alike_and_sides_that_prevent_mirroring_are_reported() -> None:
    from cascade.cli.data import describe

    data = DataConfig(sources=(ScenesSource(),), flip=0.5)
    stage = StageConfig(name="base", resolution=16)
    found = Survey("folder x", 20, looked_at=20, captions={"a photo": 12, "a cat on the left": 8})
    text = "\n".join(describe(found, data, stage))
    assert "warning: 12 of 20 captions are 'a photo'" in text
    assert "8 captions mention left, right, a flag or letters" in text
    varied = Survey("folder x", 20, looked_at=20, captions={f"picture {n}": 1 for n in range(20)})
    assert "warning" not in "\n".join(describe(varied, data, stage))


def test_a_folder_without_captions_is_told_of_its_names() -> None:
    from cascade.cli.data import describe

    problems = [f"{n}.png: no caption" for n in range(3)]
    found = Survey("folder x", 3, looked_at=3, problems=problems)
    text = "\n".join(describe(found, DataConfig(sources=(ScenesSource(),)), StageConfig(name="base", resolution=16)))
    assert "names: file" in text
