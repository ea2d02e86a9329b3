"""The command that makes the small copies: exact, complete, and not repeated."""

import io
import runpy
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_data import encoded

from cascade.config.data import ParquetSource
from cascade.data.scenes import Scene, SceneObject, draw
from cascade.data.sources import open_records
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
PICTURE = draw(Scene((SceneObject("star", "red", "small", 0.25, 0.25, 0.13),)), 1024)


def write_source(path: Path, images: list[Image.Image]) -> None:
    text = dict.fromkeys(("caption", "caption_styled", "style", "name", "group", "split"), "words")
    rows = [
        {"image": {"bytes": encoded(image), "path": None}, "id": f"a-{index}", "captions": ["one", "two"], **text}
        for index, image in enumerate(images)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def pixels(row: dict[str, Any]) -> torch.Tensor:
    return from_pil(Image.open(io.BytesIO(row["image"]["bytes"])))


@pytest.fixture
def command() -> click.Command:
    main: click.Command = runpy.run_path(str(SCRIPT))["main"]
    return main


@pytest.fixture
def out(command: click.Command, tmp_path: Path) -> Path:
    write_source(tmp_path / "emoji" / "train-noto.parquet", [PICTURE, PICTURE.reduce(4)])
    write_source(tmp_path / "photos" / "train.parquet", [Image.new("RGB", (100, 80), "green")])
    result = CliRunner().invoke(command, ["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


def test_small_copies_are_exact_area_means_with_their_captions(out: Path) -> None:
    for size in (64, 256):
        rows = rows_of(out / f"train-{size}-noto.parquet")
        assert [(row["id"], row["captions"]) for row in rows] == [("a-0", ["one", "two"]), ("a-1", ["one", "two"])]
        expected = to_uint8(downsample(to_float(from_pil(PICTURE))[None], size))[0]
        assert torch.equal(pixels(rows[0]), expected)
    records = open_records(ParquetSource(files=(str(out / "train-64-*.parquet"),), caption_column="captions"))
    assert records[1].captions == ("one", "two")


def test_tiles_are_aligned_cuts_of_true_large_pictures_with_something_to_see(out: Path) -> None:
    rows = rows_of(out / "tiles-1024-train-noto.parquet")
    assert len(rows) == 4
    for row in rows:
        name, place = row["id"].split("@")
        left, top = map(int, place.split(","))
        assert name == "a-0"
        assert (left % 4, top % 4) == (0, 0)
        tile = pixels(row)
        assert torch.equal(tile, from_pil(PICTURE)[:, top : top + 256, left : left + 256])
        assert len(tile.flatten(1).unique(dim=1).T) > 1


def test_photographs_are_cut_square(out: Path) -> None:
    (row,) = rows_of(out / "photos-train-64.parquet")
    assert pixels(row).shape == (3, 64, 64)


def test_a_second_run_keeps_what_is_there(command: click.Command, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    result = CliRunner().invoke(command, ["--data", str(out.parent), "--out", str(out)])
    assert result.output.count("already there") == 2
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_folder_without_art_is_named(command: click.Command, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no emoji/*.parquet" in result.output
