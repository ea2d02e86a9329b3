"""`cascade make` from pictures to a model that draws, with a network small enough for a test."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from helpers_model import make_tiny_cascade, tiny_stage, tiny_stage_config
from PIL import Image
from test_plan import fill

from cascade import CascadePipeline
from cascade.cli.train import make as make_command
from cascade.config.data import FolderSource
from cascade.data.survey import Survey
from cascade.errors import CascadeError
from cascade.files.atomic import write_json
from cascade.making import look as pace
from cascade.making import make as making
from cascade.making import plan
from cascade.making.look import Look
from cascade.making.make import Order, make
from cascade.making.plan import Size
from cascade.making.trials import write_redrawn
from cascade.pictures.images import downsample, from_pil, to_float, to_uint8
from cascade.settings import to_yaml
from cascade.storage.pipeline import load_encoder
from cascade.storage.training import load_train_config
from cascade.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
NETWORK = {"channels": [8], "blocks": [1], "strides": [1], "attention": [False], "embedding_dim": 16}
TINY = Size((8, 16), 0, 4, NETWORK, NETWORK)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Order]:
    """An order for a cascade of 8 and 16 px that is trained for a few steps."""
    lines: list[str] = []
    order = Order(fill(tmp_path / "pictures", 6, 16), tmp_path / "out", 1e-6, "tiny", "CC0-1.0", say=lines.append)
    with (
        patch.object(plan, "SIZES", (TINY,)),
        patch.object(plan, "LEAST_STEPS", 4),
        patch.object(plan, "SHARES", {2: (0.5, 0.5)}),
        patch.object(pace, "_ENTRIES", 2),
        patch.object(making.sweeping, "GUIDANCES", (1.0, 2.0)),
        patch.object(making.sweeping, "STEPS", (2,)),
    ):
        yield order


@pytest.mark.slow
def test_a_folder_of_pictures_becomes_a_model_with_a_card(small: Order) -> None:
    assert make(small)
    model = small.out / "model"
    card = (model / "README.md").read_text()
    assert "license: cc0-1.0" in card
    assert "6 pictures with 6 distinct captions" in card
    assert (model / "card" / "sheet.png").exists()
    pipeline = CascadePipeline.from_pretrained(model)
    assert pipeline.stage_names == ["base", "sr16"]
    assert pipeline("noise", seed=0).images[0].size == (16, 16)
    assert "(chosen)" in card
    sources = load_train_config(small.out / "sr16.yaml").data.sources  # it learns from the base stage's drawings too
    assert [source.kind for source in sources] == ["folder", "parquet"]
    assert sources[1].weight / (sources[0].weight + sources[1].weight) == pytest.approx(making.SHARE_DRAWN)


@pytest.mark.slow
def test_stopped_in_the_second_stage_it_continues_and_trains_nothing_twice(small: Order) -> None:
    real, trained = Trainer.run, list[str]()

    def run(trainer: Trainer, resume: bool = False) -> bool:
        if ".pace" in str(trainer.output):
            return real(trainer, resume)
        trained.append(trainer.config.stage.name)
        return real(trainer, resume) if len(trained) != 2 else False

    with patch.object(Trainer, "run", run):
        assert not make(small)
        edited = small.out / "sr16.yaml"
        edited.write_text(to_yaml(load_train_config(edited, ["training.steps=5"])))
        assert make(small)
    assert trained == ["base", "sr16", "sr16"]
    assert load_train_config(edited).training.steps == 5
    assert (small.out / "runs" / "sr16" / "checkpoints" / "step-00000005").exists()


@pytest.mark.parametrize(
    ("left", "by_hand", "expected"), [(1e6, False, 900), (20.0, False, 189), (-5.0, False, 50), (20.0, True, 800)]
)
def test_a_later_stage_has_as_many_steps_as_the_time_that_is_left_allows(
    tmp_path: Path, left: float, by_hand: bool, expected: int
) -> None:
    """A step takes 0.1 s; the last stage gets 0.2279 / (0.2279 + 0.0121) of the time, 0.95 of it."""
    folder = plan.Folder(tmp_path)
    base, larger = (stage for stage in TINY.stages({16: 0.1}))
    look = Look(tmp_path, Survey("look", 10), 10, 16)
    for stage in (base, larger):
        run = plan.training_run(stage, look, folder, 900, {"batch_size": 4})
        run = plan.shortened(run, 800) if by_hand else run
        folder.settings(stage.name).write_text(to_yaml(run))
    steps = {"base": 900, "sr16": 900}
    write_json(tmp_path / "plan.json", {"stages": list(steps), "steps": steps})
    order = Order(tmp_path, tmp_path, 1.0, "x", "y", say=lambda _: None)
    with (
        patch.object(making, "measure", lambda *_: pace.Pace(0.1, 1, 1)),
        patch.object(plan, "SHARES", {2: (0.76, 0.2279)}),
    ):
        making._shorten(order, folder, ["sr16"], left)
        making._shorten(order, folder, ["base", "sr16"], left)
    assert load_train_config(folder.settings("sr16")).training.steps == expected
    assert load_train_config(folder.settings("base")).training.steps == (800 if by_hand else 900)  # its plan is new


def test_redrawn_pictures_keep_the_truth_that_the_noise_left(tmp_path: Path) -> None:
    """An untrained stage that predicts x = 0 draws grey; whatever it draws, the large picture is the true one."""
    folder = fill(tmp_path / "pictures", 5, 16)
    stage = tiny_stage(tiny_stage_config("base", 8).model_copy())
    encoder = load_encoder_of(tmp_path)
    out = tmp_path / "drawn.parquet"
    assert write_redrawn(FolderSource(path=str(folder)), [stage], encoder, 16, out) == 5
    for row in pq.read_table(out).to_pylist():
        number = row["captions"][0].rpartition(" ")[2]
        stored = Image.open(io.BytesIO(row["image"]))
        assert stored.tobytes() == Image.open(folder / f"{number}.png").tobytes()
        low = to_float(from_pil(Image.open(io.BytesIO(row["low"]))))
        assert low.shape == (3, 8, 8)
        assert not torch.equal(to_uint8(low[None]), to_uint8(downsample(to_float(from_pil(stored))[None], 8)))


def load_encoder_of(tmp_path: Path) -> object:
    from helpers_text import make_tiny_t5

    return load_encoder(make_tiny_t5(tmp_path / "t5", 32), [])


# --- from weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def further(small: Order, tmp_path: Path) -> Order:
    """The order to train the base stage of a tiny model further, of which another stage stays."""
    return replace(small, start=str(make_tiny_cascade(tmp_path / "start")))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_from_a_model_the_base_stage_is_trained_further_and_the_others_stay(further: Order, whole: bool) -> None:
    assert further.start is not None
    start = Path(further.start)
    assert make(replace(further, whole=whole))
    model = further.out / "model"
    assert weights(model / "base") != weights(start / "base")
    for later in ("sr16", "sr32"):
        assert weights(model / later) == weights(start / later)
    run = load_train_config(further.out / "base.yaml")
    assert (run.training.lora_rank > 0) == (not whole)
    assert run.training.init_from == f"{start}/base"
    assert CascadePipeline.from_pretrained(model)("noise", seed=0).images[0].size == (32, 32)
    card = (model / "README.md").read_text()
    assert "its base stage trained further" in card
    assert ("low-rank adapter" in card) == (not whole)


@pytest.mark.slow
def test_what_is_to_be_kept_is_drawn_once_and_learned_as_well(further: Order) -> None:
    with patch.object(making, "_KEPT_PICTURES", 3):
        assert make(replace(further, keep=("a {red|blue} fox", "a cat")))
    run = load_train_config(further.out / "base.yaml")
    assert run.training.prior is not None
    assert run.training.prior.prompts == ("a {red|blue} fox", "a cat")
    assert len(list((further.out / "kept").glob("*.png"))) == 3
    learned = load_train_config(further.out / "runs" / "base" / "config.yaml").data.sources
    assert [source.weight for source in learned] == [1, 1]
    card = (further.out / "model" / "README.md").read_text()
    assert "50% of its views are drawings of its start, so that it keeps `a {red|blue} fox`; `a cat`." in card


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        (["--from=bundled"], making.KEPT),
        (["--from=bundled", "--keep=none"], ()),
        (["--from=bundled", "--keep=a cat", "--keep=a dog"], ("a cat", "a dog")),
        (["--from=other"], ()),
    ],
)
def test_the_bundled_stage_keeps_what_its_preset_names_unless_told(
    options: list[str], keep: tuple[str, ...], tmp_path: Path
) -> None:
    with patch.object(making, "make", return_value=True) as called:
        CliRunner().invoke(make_command, [str(tmp_path), "--out", str(tmp_path / "out"), *options])
    assert called.call_args.args[0].keep == keep
    preset = load_train_config(ROOT / "configs" / "fine-tune" / "preserved.yaml").training.prior
    assert preset is not None
    assert preset.prompts == making.KEPT


@pytest.mark.parametrize("option", ["--whole", "--keep=a cat"])
def test_options_of_further_training_need_a_model(option: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(make_command, [str(tmp_path), "--out", str(tmp_path / "out"), option])
    assert isinstance(result.exception, CascadeError)
    assert str(result.exception) == f"{option.partition('=')[0]}: needs the weights of a model; add --from MODEL"


def test_a_plan_is_not_continued_from_other_weights(further: Order) -> None:
    further.out.mkdir()
    write_json(further.out / "plan.json", {"stages": ["base"], "steps": {"base": 4}, "start": "other"})
    for start in (further.start, None):
        with pytest.raises(CascadeError, match=r"was begun with --from other; repeat that, or name another folder"):
            make(replace(further, start=start))


def test_a_model_that_is_not_there_is_named_before_any_picture_is_read(small: Order, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"gone: no such folder|gone"):
        make(replace(small, start=str(tmp_path / "gone"), pictures=tmp_path / "none"))
