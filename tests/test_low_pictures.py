"""scripts/draw_low_pictures.py: true pictures with smaller ones drawn by the previous stage."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from helpers_model import make_tiny_cascade, tiny_stage_config
from PIL import Image

from cascade.config.stage import save_stage
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8
from cascade.stage import build_stage

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("draw_low_pictures", SCRIPTS / "draw_low_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def write_rows(path: Path, pictures: dict[str, np.ndarray]) -> Path:
    rows = []
    for name, pixels in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption_styled": "a fox", "id": name})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def decoded(stored: dict[str, bytes]) -> torch.Tensor:
    return from_pil(Image.open(io.BytesIO(stored["bytes"])))


def noise(side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def draw(script: ModuleType, model: Path, stage: str | Path, out: Path, *arguments: object) -> list[dict]:
    words = ["--stage", str(model / stage), "--text-encoder", str(model / "text_encoder"), "--out", str(out)]
    result = CliRunner().invoke(script.main, [*map(str, arguments), *words])
    assert result.exit_code == 0, result.output
    return pq.read_table(out).to_pylist()


def test_a_base_stage_starts_from_the_area_mean_with_as_much_noise_as_it_is_told(
    script: ModuleType, model: Path, tmp_path: Path
) -> None:
    pictures = {f"{seed}": noise(32, seed) for seed in range(3)}
    source = write_rows(tmp_path / "train.parquet", pictures)
    # A network that answers zero finds no noise at all: what was noised stays as it is.
    stage = build_stage(tiny_stage_config("base", 8, parameterization="eps"))
    save_stage(tmp_path / "base", stage.config, dict(stage.network.named_parameters()))
    for level, most in ((11.9, 2), (-3.0, 255)):
        levels = ("--levels", level, level)
        rows = draw(script, model, tmp_path / "base", tmp_path / "drawn.parquet", source, "--count", 3, *levels)
        assert {row["id"] for row in rows} == pictures.keys()
        for row in rows:
            mean = to_uint8(downsample(to_float(torch.from_numpy(pictures[row["id"]]).permute(2, 0, 1))[None], 8))[0]
            change = int((decoded(row["low"]).int() - mean.int()).abs().max())
            assert change <= most
            assert change > 30 or level > 0


def test_tiles_get_the_same_part_of_the_smaller_picture_that_they_are_of_the_large_one(
    script: ModuleType, model: Path, tmp_path: Path
) -> None:
    whole = noise(16, 0)
    write_rows(tmp_path / "whole.parquet", {"a": whole})
    (row,) = draw(script, model, "sr16", tmp_path / "drawn.parquet", tmp_path / "whole.parquet")
    low = decoded(row["low"])
    assert low.shape == (3, 16, 16)
    tile = noise(256, 1)  # 1024 px in all, so 4 px of 16 in the smaller picture
    write_rows(tmp_path / "tiles.parquet", {"a@512,256": tile})
    options = ("--whole", tmp_path / "whole.parquet")
    (row,) = draw(script, model, "sr16", tmp_path / "drawn.parquet", tmp_path / "tiles.parquet", *options)
    assert torch.equal(decoded(row["low"]), low[:, 4:8, 8:12])


def test_a_tile_whose_whole_picture_is_missing_is_named(script: ModuleType, model: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "tiles.parquet", {"a@0,0": noise(8, 0)})
    words = [str(source), "--stage", str(model / "sr16"), "--text-encoder", str(model / "text_encoder")]
    result = CliRunner().invoke(script.main, [*words, "--out", str(tmp_path / "out.parquet")])
    assert result.exit_code == 1
    assert "a@0,0: a tile; name the files with the whole pictures by --whole" in result.output


def test_a_super_resolution_stage_of_strength_0_leaves_the_true_picture(
    script: ModuleType, model: Path, tmp_path: Path
) -> None:
    whole = noise(32, 0)
    source = write_rows(tmp_path / "whole.parquet", {"a": whole})
    mean = to_uint8(downsample(to_float(torch.from_numpy(whole).permute(2, 0, 1))[None], 16))[0]
    drawn = {}
    for strength in (0.0, 1.0):
        options = ("--strength", strength, strength)
        (row,) = draw(script, model, "sr16", tmp_path / "drawn.parquet", source, *options)
        drawn[strength] = decoded(row["low"])
    assert torch.equal(drawn[0.0], mean)
    assert not torch.equal(drawn[1.0], mean)
