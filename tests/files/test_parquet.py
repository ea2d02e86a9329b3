"""Damaged or wrong Parquet files give a one-line error with file, column and row."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from helpers_art import encoded, picture
from pyarrow import parquet

from cascade.errors import CascadeError
from cascade.evaluation import art_data
from cascade.evaluation.art_data import read_art
from cascade.evaluation.super_resolution import read_pairs
from cascade.files.containers import read_table, rows
from cascade.prompts.reading import read_prompts
from cascade.prompts.sources import count_prompts

GOOD = {
    "image": [{"bytes": encoded(picture("red", 64)), "path": None}] * 3,
    "id": ["a", "b", "c"],
    "caption": ["a fox"] * 3,
    "captions": [["a fox", "a red fox"]] * 3,
    "caption_styled": ["a fox"] * 3,
    "style": ["noto"] * 3,
    "group": ["Animals"] * 3,
    "codepoints": ["1f98a"] * 3,
}


def read_all(folder: Path) -> None:
    """Everything that evaluation and prompts read of a file of true pictures."""
    read_art(folder, "test")
    for cached in (art_data.shelf, art_data._encoded):
        cached.cache_clear()
    large = art_data.shelf(folder, 64)
    large.pictures(list(large.entries))
    read_pairs(folder / "test-64.parquet", (32, 16), 2, 0)


def outcome(folder: Path) -> str:
    """What is said of a folder; empty when it can be read."""
    return told(lambda: read_all(folder))


def told(read: Callable[[], object]) -> str:
    """What is said of a file, in one line; empty when it can be read."""
    said = ""
    try:
        read()
    except CascadeError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    return said


def write(folder: Path, **changes: object) -> Path:
    table = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    parquet.write_table(pa.table(table), folder / "test-64.parquet")
    return folder


def test_a_good_file_is_read(tmp_path: Path) -> None:
    assert outcome(write(tmp_path)) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "has no column image"),
        ({"image": [None] * 3}, "row 0: image: expected a picture, found null"),
        ({"image": ["a.png"] * 3}, "row 0: image: expected a picture, found str"),
        ({"image": [b""] * 3}, "a: not a readable picture: cannot identify image file"),
        ({"image": [{"bytes": None, "path": "a.png"}] * 3}, "a: not a readable picture: cannot identify image file"),
        ({"image": [encoded(picture("red", 64))[:300]] * 3}, "a: not a readable picture: "),
        ({"image": [encoded(picture("red", 63))] * 3}, "a: 63x63, expected 64x64"),
        ({"id": [1, 2, 3]}, "row 0: id: expected text, found int"),
        ({"caption": ["a", None, "b"]}, "row 1: caption: expected text, found null"),
        ({"captions": ["a"] * 3}, "row 0: captions: expected a list, found str"),
        ({"captions": [[None]] * 3, "caption_styled": [3] * 3}, "row 0: caption_styled: expected text, found int"),
        ({name: [] for name in GOOD}, "no pictures in test-64.parquet"),
    ],
    ids=str,
)
def test_what_a_file_holds_in_place_of_what_is_read_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    said = outcome(write(tmp_path, **changes))
    assert "test-64.parquet" in said
    assert message in said


def test_a_damaged_file_is_named_wherever_the_damage_is(tmp_path: Path) -> None:
    path = write(tmp_path) / "test-64.parquet"
    content, chance, said = path.read_bytes(), random.Random(0), []
    for _ in range(150):
        damaged = bytearray(content[: chance.choice([len(content)] * 3 + [chance.randrange(len(content))])])
        for _ in range(chance.choice([1, 4, 64])):
            # Near the end, where the file says what it holds, as often as anywhere.
            start = chance.choice([0, max(0, len(damaged) - 900)])
            if damaged:
                damaged[chance.randrange(start, len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        said.append(outcome(tmp_path))
        assert not said[-1] or "test-64.parquet" in said[-1]
    assert sum(map(bool, said)) > 50


def test_damaged_prompts_are_named_too(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": [f"a fox {number}" for number in range(50)]}), path)
    content, chance = path.read_bytes(), random.Random(1)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(8):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        for read in (lambda: list(read_prompts(str(path), 0)), lambda: count_prompts(str(path))):
            said = told(read)
            assert not said or said.startswith(f"{path}: ")


def test_optional_columns_may_be_missing_or_null(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": ["a", "b"], "width": [1, None]}), path)
    kinds, optional = {"id": str}, {"width": int, "height": int}
    assert list(rows(read_table(path, kinds, optional), path, kinds, optional)) == [
        {"id": "a", "width": 1}, {"id": "b", "width": None},
    ]  # fmt: skip
