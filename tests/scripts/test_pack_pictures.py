"""scripts/pack_pictures.py: the stored data of a picture, and errors for other files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers_art import encoded, picture, record
from pack_pictures import fitted, main, row
from PIL import Image


def opened(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pack(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    return done.exit_code, done.output


def test_a_picture_of_the_size_keeps_its_bytes() -> None:
    own = record(picture("red"), "noto", "a star")
    assert fitted(own, 256) == own["image"]["bytes"]


def test_a_lossless_picture_of_another_mode_keeps_its_pixels() -> None:
    image = picture("red").convert("P")
    own = record(image, "noto", "a star")
    assert np.array_equal(opened(fitted(own, 256)), np.asarray(image.convert("RGB")))


def test_a_picture_that_is_not_square_lies_in_the_middle_on_white() -> None:
    found = opened(fitted(record(Image.new("RGB", (256, 128), "black"), "noto", "a bar"), 256))
    assert (found[64:192] == 0).all()
    assert (found[:64] == 255).all()
    assert (found[192:] == 255).all()


@pytest.mark.parametrize(
    ("caption", "flip"),
    [
        ("a red star", True),
        ("an upright piano", True),
        ("a bright star", True),
        ("the left hand", False),
        ("a Right-pointing hand", False),
        ("arrows", False),
        ("counterclockwise", False),
        ("flag of Japan", False),
        ("three o'clock", False),
        ("the letter B", False),
    ],
)
def test_pictures_with_sides_or_writing_may_not_be_mirrored(caption: str, flip: bool) -> None:
    assert row(record(picture("red"), "noto", "a thing", caption))["flip"] is flip


def test_captions_are_told_once_the_styled_one_first() -> None:
    own = record(picture("red"), "noto", "a star, noto style") | {"captions": ["a star", "a star, noto style", "star"]}
    assert row(own)["captions"] == ["a star, noto style", "a star", "star"]


def test_the_limit_counts_the_pictures_of_each_file(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.parquet" for name in "ab"]
    for file in files:
        records = [record(picture("red"), "noto", f"star {number} of {file.stem}") for number in range(3)]
        pq.write_table(pa.Table.from_pylist(records), file)
    status, said = pack(*files, "--out", tmp_path / "out" / "pack", "--limit", 2)
    assert status == 0, said
    with np.load(tmp_path / "out" / "pack") as found:  # the name that was asked for, whatever its ending
        captions = [own["captions"][0] for own in json.loads(found["rows"].tobytes())]
        assert captions == ["star 0 of a", "star 1 of a", "star 0 of b", "star 1 of b"]
        assert found["ends"].tolist() == [len(encoded(picture("red"))) * count for count in (1, 2, 3, 4)]


def no_parquet(file: Path) -> None:
    file.write_bytes(b"PAR1 no parquet")


def no_captions(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": b""}, "style": "noto"}]), file)


def no_picture(file: Path) -> None:
    own = record(picture("red"), "noto", "a star")
    pq.write_table(pa.Table.from_pylist([own | {"image": {"bytes": b"no picture"}}]), file)


def no_rows(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist([record(picture("red"), "noto", "a star")]).slice(0, 0), file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_parquet, "art.parquet: cannot be read as parquet"),
        (no_captions, "art.parquet: no column caption_styled"),
        (no_picture, "the picture 'a star' cannot be read"),
        (no_rows, "art.parquet: no pictures; nothing was written"),
    ],
)
def test_a_wrong_file_is_a_one_line_error(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "art.parquet")
    status, said = pack(tmp_path / "art.parquet", "--out", tmp_path / "out.npz")
    assert status == 1
    assert message in said
    assert sum("Error" in line for line in said.splitlines()) == 1
    assert not (tmp_path / "out.npz").exists()
