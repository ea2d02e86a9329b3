"""The sr suite measures every super-resolution stage on held-out pictures, compared with bicubic and Lanczos."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_configs
from PIL import Image

from cascade.cli.program import main
from cascade.errors import CascadeError
from cascade.evaluation.super_resolution import AVERAGED, busiest, read_pairs, resized
from cascade.pictures.images import downsample, to_float, to_uint8
from cascade.pictures.rasters import write_array


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def write_pictures(path: Path, sides: list[int]) -> None:
    rows = []
    for number, side in enumerate(sides):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption_styled": f"a fox {number}"})
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_every_stage_has_all_figures_with_those_of_plain_enlargement(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_pictures(data / "test.parquet", [32, 40, 32])
    arguments = ["evaluate", str(model), "--suite", "sr", "--data", str(data), "--limit", "2", "--quiet"]
    for name in ("once", "twice"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    report = json.loads((tmp_path / "once" / "report.json").read_text())
    names = {figure["name"] for figure in report["figures"]}
    for stage in ("sr16", "sr32"):
        assert {f"{stage}: {name}{way}" for name in AVERAGED for way in ("", ", bicubic", ", Lanczos")} <= names
        assert f"{stage}, from drawn pictures: consistency" in names
    assert all(figure["count"] == 2 for figure in report["figures"])
    for name in ("report.json", "report.md", "contact.png"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_four_bands_are_measured_without_the_judge_of_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bands = {"channels": ("blue", "green", "red", "nir"), "values": "uint16"}
    model = make_tiny_cascade(tmp_path / "bands", **bands)
    form, rows = tiny_configs(**bands)[0].pictures, []
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 65536, (4, 32, 32), dtype=np.uint16)
        buffer = io.BytesIO()
        write_array(buffer, torch.from_numpy(values), form, "tiff", "")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption_styled": f"a field {number}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    arguments = [
        "evaluate",
        str(model),
        "--suite",
        "sr",
        "--data",
        str(tmp_path),
        "--quiet",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    names = {figure["name"] for figure in report["figures"]}
    assert {"sr32: PSNR", "sr32: SSIM, bicubic", "sr32: edge strength, Lanczos"} <= names
    assert not any("feature distance" in name for name in names)
    assert "whose judge wants three channels" in (tmp_path / "r" / "report.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(model), "--suite", "scenes", "--out", str(tmp_path / "s")]) == 2
    assert "CLIP want three channels of 8 bits, this model draws 4 channels" in capsys.readouterr().err


def test_a_stage_without_large_enough_files_is_noted_and_none_at_all_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "test-16.parquet", [16])
    arguments = ["evaluate", str(model), "--suite", "sr", "--quiet", "--out", str(tmp_path / "report")]
    assert main([*arguments, "--data", str(tmp_path)]) == 0
    assert "sr32 was not measured: no pictures of 32 px" in (tmp_path / "report" / "report.md").read_text()
    capsys.readouterr()
    assert main([*arguments, "--data", str(tmp_path / "report")]) == 2
    assert "no test-256.parquet and no test.parquet" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--suite sr: needs true pictures" in capsys.readouterr().err


def test_pairs_are_of_pictures_large_enough_and_the_smaller_is_the_area_mean_in_eight_bits(tmp_path: Path) -> None:
    write_pictures(tmp_path / "test.parquet", [16, 64, 32])
    pairs = read_pairs(tmp_path / "test.parquet", (32, 8), count=5, seed=0)
    assert sorted(pair.caption for pair in pairs) == ["a fox 1", "a fox 2"]
    for pair in pairs:
        assert pair.truth.shape == (1, 3, 32, 32)
        assert torch.equal(pair.low, to_float(to_uint8(downsample(pair.truth, 8))))
        assert resized(pair, "bicubic").shape == pair.truth.shape
    with pytest.raises(CascadeError, match="no picture of 128 px or more"):
        read_pairs(tmp_path / "test.parquet", (128, 32), count=5, seed=0)


def test_smaller_pictures_of_their_own_take_the_place_of_area_means(tmp_path: Path) -> None:
    write_pictures(tmp_path / "test.parquet", [32, 32])
    table = pq.read_table(tmp_path / "test.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    lows = pa.array([{"bytes": buffer.getvalue(), "path": None}] * 2, type=table.schema.field("image").type)
    pq.write_table(table.append_column("low", lows), tmp_path / "drawn.parquet")
    for pair in read_pairs(tmp_path / "drawn.parquet", (32, 8), 2, seed=0, low_column="low"):
        assert torch.equal(pair.low[0, :, 3, 3], torch.tensor([1.0, -1.0, -1.0]))


def test_the_crop_that_is_shown_is_where_the_picture_changes_most() -> None:
    picture = torch.zeros(1, 3, 100, 120)
    picture[..., 61:79, 41:59] = torch.rand(18, 18, generator=torch.Generator().manual_seed(0))
    left, top, right, bottom = busiest(picture, 40)
    assert (right - left, bottom - top) == (40, 40)
    assert left <= 41 < 59 <= right
    assert top <= 61 < 79 <= bottom
    assert busiest(picture, 500) == (0, 0, 100, 100)  # no larger than the picture
