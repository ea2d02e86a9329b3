"""The plan of `cascade make`: what is in the folder, which sizes the time allows, and what is written."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from cascade.config.training import TrainConfig
from cascade.data.survey import Survey
from cascade.errors import CascadeError
from cascade.making import plan
from cascade.making.look import Look, Pace, look_at
from cascade.making.plan import SHARES, SIZES, Folder, choose, residual_scales, shortened, training_run
from cascade.pictures.images import from_pil, to_float
from cascade.settings import to_yaml
from cascade.storage.training import load_train_config

GIGABYTE = 10**9


def fill(folder: Path, count: int, side: int = 32, captions: bool = True) -> Path:
    """Pictures of noise, each with a caption of its own."""
    folder.mkdir()
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"noise number {number}")
    return folder


def seen(folder: Path, usable: int, short_side: int) -> Look:
    return Look(folder, Survey("look", usable), usable, short_side)


def test_the_look_counts_sizes_copies_and_what_cannot_be_used(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", 6)
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("a copy")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("broken")
    Image.new("RGB", (64, 32)).save(folder / "wide.png")
    (folder / "wide.txt").write_text("wide")
    look = look_at(folder)
    text = "\n".join(look.lines())
    assert (look.usable, look.short_side, look.holds_out) == (8, 32, False)
    for line in (
        "8 pictures to learn from",
        "32x32 to 64x32",
        "7 square, 1 wide",
        "cannot be used: 1",
        "copies of another: 1",
    ):
        assert line in text


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", 3)
    with pytest.raises(CascadeError, match="3 pictures with captions, of 3; 4 are the least"):
        look_at(folder)


def test_names_are_captions_where_a_folder_has_no_others_and_the_look_reports_it(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", 4, captions=False)
    for number in range(4):
        (folder / f"{number}.png").rename(folder / f"blue-bird_{number}.png")
    look = look_at(folder)
    assert (look.names, dict(look.found.captions)) == ("file", {"blue bird": 4})
    assert any("names of the files are taken" in line for line in look.lines())
    fill(folder / "red fox", 2, captions=False)
    assert look_at(folder).names == "folder"


def test_no_stage_is_larger_than_the_pictures() -> None:
    assert [size.fitted(100).resolutions for size in SIZES[:3]] == [(16, 32, 64), (32, 64), (32, 64)]
    assert SIZES[-1].fitted(1024).resolutions == (64, 256, 1024)
    with pytest.raises(CascadeError, match="about 8 px; the smallest stage needs 16"):
        SIZES[0].fitted(8)


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_every_size_makes_stages_that_chain(number: int) -> None:
    size = SIZES[number]
    stages = size.stages(dict.fromkeys(size.resolutions, 0.1))
    assert [stage.low_resolution for stage in stages] == [None, *size.resolutions[:-1]]
    assert len({stage.name for stage in stages}) == 3


@pytest.mark.parametrize(
    ("speed", "expected"),
    [(1e9, (16, 32, 64)), (2e11, (32, 64, 128)), pytest.param(1e15, (64, 256, 1024), marks=pytest.mark.slow)],
)
def test_the_largest_size_is_chosen_whose_base_stage_sees_enough_pictures(
    tmp_path: Path, speed: float, expected: tuple[int, ...]
) -> None:
    """On a machine that computes `speed` operations per second, whatever the network."""

    def measured(config: TrainConfig, _scratch: Path) -> Pace:
        flops = plan.StageCost(config.stage).flops_per_call(16)
        return Pace(flops * config.training.batch_size / speed, GIGABYTE, GIGABYTE)

    look = seen(tmp_path, 300, 1024)
    scales = dict.fromkeys((32, 64, 128, 256, 1024), 0.1)
    with patch.object(plan, "measure", measured), patch.object(plan, "residual_scales", lambda *_: scales):
        runs = choose(look, Folder(tmp_path / "out"), 3600)
    assert tuple(run.config.stage.resolution for run in runs) == expected
    for run, share in zip(runs, SHARES[3], strict=True):
        if run.config.training.steps > plan.LEAST_STEPS:
            assert run.seconds == pytest.approx(3600 * share, abs=run.pace.seconds)


def test_the_spread_of_the_residual_is_that_of_what_enlarging_loses(tmp_path: Path) -> None:
    """Columns black and white in turn: the area mean is grey, and all that is lost is 1 in [-1, 1] each way."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    stripes = Image.new("L", (32, 32))
    stripes.putdata([255 * (place % 2) for place in range(32 * 32)])
    for number in range(4):
        stripes.convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("stripes")
    assert to_float(from_pil(stripes)).std() == pytest.approx(1.0, abs=0.01)
    assert residual_scales((16, 32), look_at(folder)) == {32: pytest.approx(1.0, abs=0.01)}


def test_a_planned_run_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    look = seen(tmp_path / "pictures", 300, 256)
    for stage in SIZES[1].stages({64: 0.1, 128: 0.1}):
        run = training_run(stage, look, Folder(tmp_path), 200, {"batch_size": 8})
        path = tmp_path / f"{stage.name}.yaml"
        path.write_text(to_yaml(run))
        assert load_train_config(path) == run


def test_a_shortened_run_keeps_the_shape_of_its_schedule(tmp_path: Path) -> None:
    (stage, *_) = SIZES[1].stages({64: 0.1, 128: 0.1})
    run = training_run(stage, seen(tmp_path, 300, 256), Folder(tmp_path), 900, {"batch_size": 8})
    short = shortened(run, 300)
    path = tmp_path / "base.yaml"
    path.write_text(to_yaml(short))
    assert load_train_config(path) == short  # it is valid
    before, after = run.training, short.training
    assert (after.steps, after.optimizer.decay_steps) == (300, before.optimizer.decay_steps // 3)
    assert after.sample_every == before.sample_every // 3
    assert after.optimizer.learning_rate == before.optimizer.learning_rate
