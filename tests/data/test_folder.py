"""A folder of pictures: the column of captions, and the pictures that are held out."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cascade.config.data import FolderSource, ParquetSource, WebDatasetSource
from cascade.data.folder import FolderRecords, is_held_out
from cascade.data.sources import check_places
from cascade.errors import CascadeError


def picture(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / name)


def records(folder: Path, column: str = "caption", split: str = "all") -> FolderRecords:
    source = FolderSource.model_validate({"path": str(folder), "caption_column": column, "split": split})
    return FolderRecords(source)


def test_a_column_named_text_is_read_as_captions_as_the_guides_of_diffusers_have_it(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    assert records(tmp_path)[0].captions == ("a cat",)


def test_a_caption_column_goes_before_one_named_text(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,caption\na.png,a cat,a dog\n")
    assert records(tmp_path)[0].captions == ("a dog",)


def test_a_missing_column_is_named_with_the_setting_that_chooses_another(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,a cat\n")
    with pytest.raises(CascadeError, match=r"no column 'caption'; the columns are file_name, prompt; .*caption_column"):
        records(tmp_path)
    assert records(tmp_path, "prompt")[0].captions == ("a cat",)


def test_the_splits_part_a_folder_and_new_pictures_move_no_other(tmp_path: Path) -> None:
    def origins(split: str) -> set[str]:
        found = records(tmp_path, split=split)
        return {found[place].origin for place in range(len(found))}

    for number in range(80):
        picture(tmp_path, f"{number}.png")
    train, held_out = origins("train"), origins("held_out")
    assert train | held_out == origins("all")
    assert not train & held_out
    assert 1 <= len(held_out) <= 15  # 5 on average
    for number in range(80, 120):
        picture(tmp_path, f"{number}.png")
    assert train <= origins("train")
    assert held_out <= origins("held_out")


def test_a_split_that_leaves_no_picture_is_an_error(tmp_path: Path) -> None:
    name = next(f"{number}.png" for number in range(99) if not is_held_out(tmp_path / f"{number}.png", tmp_path))
    picture(tmp_path, name)
    with pytest.raises(CascadeError, match="split: held_out leaves none of 1 pictures"):
        records(tmp_path, split="held_out")


def test_places_that_do_not_exist_are_found_without_reading_anything(tmp_path: Path) -> None:
    for source in (
        FolderSource(path=str(tmp_path / "none")),
        ParquetSource(files=(str(tmp_path / "*.parquet"),)),
        WebDatasetSource(files=(str(tmp_path / "*.tar"),)),
    ):
        with pytest.raises(CascadeError, match=r"no such folder|no file matches"):
            check_places([source])
    check_places([FolderSource(path=str(tmp_path))])


def test_names_of_files_or_folders_are_captions_only_where_there_are_no_others(tmp_path: Path) -> None:
    for name in ("red-apple_03.png", "IMG.png"):
        picture(tmp_path / "tall trees", name)
    (tmp_path / "tall trees" / "IMG.txt").write_text("a true caption")
    found = {
        names: sorted(FolderRecords(FolderSource.model_validate({"path": str(tmp_path), "names": names})).captions())
        for names in ("none", "file", "folder")
    }
    assert found["none"] == [(), ("a true caption",)]
    assert found["file"] == [("a true caption",), ("red apple",)]
    assert found["folder"] == [("a true caption",), ("tall trees",)]
