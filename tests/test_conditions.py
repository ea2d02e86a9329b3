"""Conditions other than text: values, networks, guidance, drawing, recipes and prompt files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_training import TRANSFORMER, fill, micro_config, trainer
from PIL import Image
from torch import Tensor

from cascade import CascadeError
from cascade.conditioning import Conditioning, Given
from cascade.conditions.settings import RESERVED, ClassCondition, NumberCondition, PictureCondition, VectorCondition
from cascade.conditions.values import checked, joined, measured, settled
from cascade.config.sampling import SamplingConfig
from cascade.data.loader import batches
from cascade.prompts.records import COLUMNS
from cascade.resources.memory import StageCost
from cascade.stage import Stage, build_stage, calls_at_once, links
from cascade.storage.stage import load_stage
from cascade.storage.training import load_train_config

SHAPE = ClassCondition(labels=("circle", "square", "star"))
AGE = NumberCondition(range=(0.0, 100.0))
STYLE = VectorCondition(dim=4)
LAYOUT = PictureCondition()
ALL = {"shape": SHAPE, "age": AGE, "style": STYLE, "layout": LAYOUT}
SIZE = (8, 8)


def outline(value: int = 200, size: tuple[int, int] = SIZE) -> Image.Image:
    image = Image.new("L", (size[1], size[0]))
    image.paste(value, (2, 2, size[1] - 2, size[0] - 2))
    return image


GIVEN: dict[str, Any] = {"shape": "star", "age": 41, "style": [1.0, 2.0, 3.0, 4.0], "layout": outline()}


# --- values --------------------------------------------------------------------------------------------------------


def test_values_are_read_from_python_text_and_tables(tmp_path: Path) -> None:
    np.save(tmp_path / "style.npy", np.arange(4))
    outline().save(tmp_path / "layout.png")
    assert checked("shape", SHAPE, "star") == "star"
    assert checked("digits", ClassCondition(labels=("0", "1")), 1.0) == "1"
    assert [checked("age", AGE, value) for value in (41, "41", np.float32(41), torch.tensor(41))] == [41.0] * 4
    for value in ([0, 1, 2, 3], "0,1,2,3", str(tmp_path / "style.npy"), np.arange(4.0)):
        assert torch.equal(_tensor(checked("style", STYLE, value)), torch.arange(4.0))
    pictures = [outline(), str(tmp_path / "layout.png"), np.asarray(outline()), (tmp_path / "layout.png").read_bytes()]
    for picture in pictures:
        assert torch.equal(_tensor(checked("layout", LAYOUT, picture)), _tensor(checked("layout", LAYOUT, outline())))
    assert torch.equal(
        _tensor(checked("layout", LAYOUT, "layout.png", tmp_path))[0, 4], torch.tensor([0, 0, *[200] * 4, 0, 0])
    )
    for missing in (None, float("nan"), "", "none", "None"):
        assert checked("age", AGE, missing) is None


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shape", "stars", "condition shape: 'stars' is not one of 'circle', 'square', 'star'; did you mean star?"),
        ("age", 101, "condition age: 101; expected a number from 0 to 100"),
        ("age", "old", "condition age: 'old'; expected a number from 0 to 100"),
        ("style", [1, 2], "condition style: has shape [2]; expected 4 numbers, or the path of a .npy file"),
        ("style", "gone.npy", "condition style: gone.npy: no such file"),
        ("style", [1, 2, 3, float("inf")], "condition style: holds NaN or infinity"),
        ("layout", "gone.png", "condition layout: gone.png: no such file"),
        ("layout", 3, "condition layout: int; expected a picture or the path of one"),
        ("height", 3, "condition 'height': this model reads shape (one of 'circle', 'square', 'star'), age (a number"),
        ("shap", "star", "did you mean shape?"),
    ],
)
def test_wrong_values_are_one_line_with_what_is_known(name: str, value: object, message: str) -> None:
    with pytest.raises(CascadeError) as caught:
        settled([ALL], {**GIVEN, name: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_condition_names_what_the_model_reads_and_the_way_out() -> None:
    with pytest.raises(
        CascadeError, match=r"condition age is missing; this model reads shape .*--condition age=.*`none`"
    ):
        settled([ALL], {name: value for name, value in GIVEN.items() if name != "age"})
    defaulted = {**ALL, "age": AGE.model_copy(update={"default": 7.0})}
    assert settled([defaulted], {name: value for name, value in GIVEN.items() if name != "age"})["age"] == 7.0
    assert settled([ALL], {**GIVEN, "age": "none"})["age"] is None


def test_label_maps_keep_their_numbers_and_are_never_mixed() -> None:
    labels = PictureCondition(labels=3)
    picture = torch.tensor([[[0, 0, 2, 2], [0, 0, 2, 2]]], dtype=torch.uint8)
    assert torch.equal(_tensor(checked("map", labels, picture)), picture)
    assert set(labels.fitted(picture, (8, 16), 1).unique().tolist()) == {0, 2}
    assert set(labels.fitted(picture, (1, 3), 1).unique().tolist()) <= {0, 2}
    with pytest.raises(CascadeError, match="has the label 2; expected numbers below 2"):
        checked("map", PictureCondition(labels=2), picture)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert _tensor(checked("map", labels, palette)).unique().tolist() == [1]


def test_the_detail_of_a_picture_is_that_of_its_resolution() -> None:
    picture = torch.tensor([[[0, 100, 0, 0], [0, 0, 0, 0]]], dtype=torch.uint8).repeat(1, 2, 1)  # 4x4
    fitted = LAYOUT.fitted(picture, (4, 4), 2)
    assert torch.equal(fitted[0], torch.tensor([[25, 25, 0, 0]] * 4, dtype=torch.uint8))


def test_columns_of_prompt_files_are_no_names_of_conditions() -> None:
    assert set(COLUMNS) <= RESERVED


# --- networks ------------------------------------------------------------------------------------------------------


def conditioned(base: Stage, conditions: Mapping[str, Any]) -> Stage:
    """A trained stage that reads more conditions from now on, with their fresh weights."""
    new = build_stage(base.config.model_copy(update={"conditions": dict(conditions)}), seed=5)
    missing, unexpected = new.network.load_state_dict(base.network.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("conditions.") for name in missing)
    assert missing
    new.network.eval()
    return new


def text(count: int) -> Conditioning:
    rng = torch.Generator().manual_seed(3)
    return Conditioning(torch.randn(count, 3, 16, generator=rng), torch.ones(count, 3, dtype=torch.bool))


def noise(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(4)), torch.zeros(count, 1, 1, 1)


KINDS: dict[str, tuple[str, ...]] = {"unet": (), "transformer": TRANSFORMER}


def micro_stage(kind: str, tmp_path: Path) -> Stage:
    stage = build_stage(micro_config(tmp_path / "run", *KINDS[kind]).stage)
    fill(stage.network)
    stage.network.eval()
    return stage


def rows(*given: Mapping[str, Any]) -> dict[str, Given]:
    return joined(ALL, [settled([ALL], one) for one in given], SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_added_to_a_trained_stage_changes_no_bit_before_it_is_trained(kind: str, tmp_path: Path) -> None:
    stage = micro_stage(kind, tmp_path)
    new = conditioned(stage, ALL)
    with torch.inference_mode():
        before = stage.network(*noise(), text(2))
        cond = replace(text(2), given=rows(GIVEN, {**GIVEN, "shape": "none"}))
        assert torch.equal(new.network(*noise(), cond), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "other"),
    [("shape", "circle"), ("age", 42), ("style", [0, 0, 0, 1]), ("layout", outline(100)), *[(n, "none") for n in ALL]],
)
def test_every_condition_and_its_absence_reach_the_output(kind: str, name: str, other: object, tmp_path: Path) -> None:
    network = conditioned(micro_stage(kind, tmp_path), ALL).network
    fill(network)
    with torch.inference_mode():
        cond = replace(text(2), given=rows(GIVEN, {**GIVEN, name: other}))
        z, level = noise(1)
        same = network(torch.cat([z, z]), torch.cat([level, level]), replace(cond, text=cond.text[:1].repeat(2, 1, 1)))
        assert not torch.equal(same[0], same[1])


def test_a_missing_value_has_no_influence(tmp_path: Path) -> None:
    network = conditioned(micro_stage("unet", tmp_path), ALL).network
    fill(network)
    none = dict.fromkeys(ALL, "none")
    absent = {name: replace(one, present=torch.zeros(1, dtype=torch.bool)) for name, one in rows(GIVEN).items()}
    with torch.inference_mode():
        outputs = [network(*noise(1), replace(text(1), given=given)) for given in (rows(none), absent)]
    assert torch.equal(*outputs)


def test_the_null_of_guidance_has_no_conditions_and_keeps_the_text() -> None:
    cond = replace(text(1), given=rows(GIVEN))
    null = cond.without()
    assert not any(one.present.any() for one in null.given.values())
    assert null.text is cond.text
    assert [bool(one.present) for one in cond.without(["age"]).given.values()] == [True, False, True, True]
    both = cond.joined(null).given["age"]
    assert both.present.tolist() == [True, False]


def test_a_stage_without_conditions_has_no_trace_of_them(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run").stage
    assert "conditions" not in config.model_dump(mode="json")
    assert "guidance_of" not in config.model_dump(mode="json")["sampling"]
    assert not any("condition" in name for name in build_stage(config).network.state_dict())


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    def refused(*changes: str, match: str) -> None:
        with pytest.raises(CascadeError, match=match):
            micro_config(tmp_path / "run", *changes)

    folder = "data.sources=[{kind: folder, path: x}]"
    refused("stage.conditions={seed: {kind: vector, dim: 2}}", match="seed has another meaning in prompt files")
    refused("stage.conditions={a: {kind: class, labels: [a, a]}}", match="'a' is listed twice")
    refused("stage.conditions={a: {kind: class, labels: [none]}}", match="stands for no class")
    refused("stage.conditions={a: {kind: number, range: [2.0, 1.0]}}", match="empty; give the smaller number first")
    refused("stage.conditions={a: {kind: picture, resolution: 3}}", match="does not divide the stage's resolution 8")
    refused("stage.conditions={a: {kind: picture}}", folder, "data.jitter=0.1", match="set data.jitter: 0")
    refused("stage.conditions={a: {kind: picture}}", folder, "data.decoded=d", match="leave it out with condition a")
    refused(
        "stage.conditions={b: {kind: number, range: [1, 9], measure: height}}",
        folder,
        "data.decoded=d",
        match="leave it out with condition b",
    )
    refused("stage.conditions={a: {kind: vector, dim: 2}}", match="drawn scenes have no value of condition a")
    refused("stage.conditions={a: {kind: vectr}}", match="'vectr' is not one of class, number, vector, picture")
    refused("stage.sampling.guidance_of={a: 2.0}", match="guidance_of: a is not read by this stage, but text")
    refused("data.sources=[{kind: folder, path: x, columns: {a: b}}]", match="columns: a is not a condition")
    refused("data.sources=[{kind: folder, path: x, folder_condition: a}]", match="a is not a condition of kind class")
    refused("stage.sampling={guidance_of: {text: 2.0}, guidance_rescale: 0.5}", match="guidance_of excludes")


# --- guidance of single conditions -----------------------------------------------------------------------------------


def test_single_weights_reveal_the_conditions_one_after_another(tmp_path: Path) -> None:
    config = micro_stage("unet", tmp_path).config.model_copy(update={"conditions": {"a": AGE, "b": SHAPE}})
    settings = SamplingConfig(guidance=2.0, guidance_of={"b": 3.0})
    assert links(config, settings) == ([["b"], ["a", "text"]], [3.0, 2.0])
    every = SamplingConfig(guidance_of={"text": 5.0, "b": 3.0, "a": 1.5})
    assert links(config, every) == ([["a"], ["b"], ["text"]], [1.5, 3.0, 5.0])
    assert calls_at_once(config, every) == 4
    assert calls_at_once(config, SamplingConfig(guidance_of={"text": 2.0, "b": 2.0, "a": 2.0})) == 2
    guided = config.model_copy(update={"sampling": SamplingConfig(steps=2, guidance_of=every.guidance_of)})
    assert StageCost(guided).calls() == 4 * StageCost(config).calls()


def test_equal_single_weights_are_the_usual_guidance(tmp_path: Path) -> None:
    stage = conditioned(micro_stage("unet", tmp_path), ALL)
    fill(stage.network)
    stage.config = stage.config.model_copy(update={"parameterization": "x"})
    cond = replace(text(1), given=rows(GIVEN))
    null = cond.without().with_text(torch.zeros(1, 3, 16), cond.text_mask)
    usual, single, other = (
        stage.sample(cond, null, noise(1)[0], [torch.Generator()], settings)
        for settings in (
            SamplingConfig(steps=3, guidance=3.0, threshold=None),
            SamplingConfig(steps=3, guidance=3.0, guidance_of={"layout": 3.0}, threshold=None),
            SamplingConfig(steps=3, guidance=3.0, guidance_of={"layout": 1.0}, threshold=None),
        )
    )
    assert torch.allclose(usual, single, atol=1e-4)  # float32, another order of sums
    assert (usual - other).abs().max() > 1e-3


# --- data ------------------------------------------------------------------------------------------------------------


def write_records(folder: Path, count: int = 8, **columns: Any) -> Path:
    """Pictures with columns, by name: a function of the index."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(count):
        Image.new("RGB", (24, 16), (20 * index, 0, 0)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", **{name: of(index) for name, of in columns.items()}}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_values_of_records_reach_the_batch_with_their_picture(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "data", years=lambda index: index, shape=lambda index: SHAPE.labels[index % 3])
    config = micro_config(
        tmp_path / "run",
        "stage.model.text=none",
        "stage.conditions={shape: {kind: class, labels: [circle, square, star], dropout: 0.0},"
        " age: {kind: number, range: [0.0, 100.0], dropout: 0.0}}",
        f"data.sources=[{{kind: folder, path: {folder}, columns: {{age: years}}}}]",
        "data.joint_dropout=0.0",
        "data.aspect=crop",
    )
    batch = next(batches(config.data, config.stage, 0, batch_size=16))
    index = batch.images[:, 0, 0, 0].long() // 20
    assert torch.allclose(batch.given["age"].value, index / 100)
    assert torch.equal(batch.given["shape"].value, index % 3)
    assert batch.given["age"].present.all()
    assert batch.captions == [""] * 16


def test_values_are_kept_beside_pictures_that_are_decoded_once(tmp_path: Path) -> None:
    """Of a class, a number that some records lack, and a vector in a file that the record names."""

    def style(index: int) -> str:
        np.save(tmp_path / "data" / f"{index}.npy", np.full(2, index))
        return f"{index}.npy"

    folder = write_records(
        tmp_path / "data",
        age=lambda index: index if index % 2 else None,
        shape=lambda index: SHAPE.labels[index % 3],
        style=style,
    )

    def views(*more: str) -> list[dict[str, Given]]:
        config = micro_config(
            tmp_path / "run",
            "stage.model.text=none",
            "stage.conditions={shape: {kind: class, labels: [circle, square, star]},"
            " age: {kind: number, range: [0.0, 100.0]}, style: {kind: vector, dim: 2}}",
            f"data.sources=[{{kind: folder, path: {folder}}}]",
            *more,
        )
        made = batches(config.data, config.stage, 0, batch_size=8)
        found = [next(made).given for _ in range(3)]
        made.close()
        return found

    plain, decoded = views(), views(f"data.decoded={tmp_path}/decoded")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    again = views(f"data.decoded={tmp_path}/decoded", "data.workers=1")
    for one, *others in zip(plain, decoded, again, strict=True):
        assert one.keys() == {"shape", "age", "style"}
        assert one["style"].value.abs().max() > 1
        assert not one["age"].present.all()
        for other in others:
            for name, given in one.items():
                assert torch.equal(given.value, other[name].value)
                assert torch.equal(given.present, other[name].present)


def test_dropout_of_one_condition_leaves_the_others_and_joint_dropout_takes_all(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "data", a=lambda _: 1, b=lambda _: 2, caption=lambda _: "words")
    conditions = (
        "{a: {kind: number, range: [0.0, 3.0], dropout: 0.3}, b: {kind: number, range: [0.0, 3.0], dropout: 0.0}}"
    )
    config = micro_config(
        tmp_path / "run",
        f"stage.conditions={conditions}",
        f"data.sources=[{{kind: folder, path: {folder}}}]",
        "data.joint_dropout=0.2",
        "data.caption_dropout=0.0",
    )
    batch = next(batches(config.data, config.stage, 0, batch_size=2000))
    a, b = batch.given["a"].present, batch.given["b"].present
    worded = torch.tensor([caption == "words" for caption in batch.captions])
    assert torch.equal(b, worded)  # both are missing only where all are
    assert not (a & ~b).any()
    assert float((~b).float().mean()) == pytest.approx(0.2, abs=0.03)  # 3 standard deviations of 2000 views
    assert float((~a[b]).float().mean()) == pytest.approx(0.3, abs=0.04)


def test_a_picture_condition_is_cropped_and_mirrored_like_the_picture(tmp_path: Path) -> None:
    """The condition is the picture itself, so that the two must stay equal in every view."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    lines = [
        json.dumps({"file_name": f"{index}.png", "copy_of_it": f"{index}.png", "caption": "x"}) for index in range(4)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for changes in (
        ("data.aspect=crop", "data.flip=0.5"),
        ("stage.name=sr", "stage.low_resolution=4", "data.crop=4", "data.aspect=crop", "data.flip=0.5"),
    ):
        config = micro_config(
            tmp_path / "run",
            "stage.conditions={copy_of_it: {kind: picture, channels: 3, dropout: 0.0}}",
            f"data.sources=[{{kind: folder, path: {folder}}}]",
            "data.joint_dropout=0.0",
            *changes,
        )
        batch = next(batches(config.data, config.stage, 0, batch_size=32))
        assert torch.equal(batch.given["copy_of_it"].value, batch.images)


def test_size_crop_and_aspect_are_measured(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "data", caption=lambda _: "x")
    measures = ("width", "height", "aspect", "left", "top")
    conditions = ", ".join(
        f"{name}_of_it: {{kind: number, range: [0.0, 100.0], measure: {name}, dropout: 0.0}}" for name in measures
    )
    config = micro_config(
        tmp_path / "run",
        f"stage.conditions={{{conditions}}}",
        f"data.sources=[{{kind: folder, path: {folder}}}]",
        "data.aspect=crop",
        "data.joint_dropout=0.0",
    )
    given = next(batches(config.data, config.stage, 0, batch_size=4)).given
    found = [float(given[f"{name}_of_it"].value[0]) * 100 for name in measures]
    assert found == pytest.approx([24, 16, 1.5, 4 * 8 / 16, 0])  # of 24 px 4 on the left, at half the size
    assert measured(NumberCondition(range=(0.0, 10.0), measure="width"), {"width": 24.0}) == 10.0


def test_a_stage_that_reads_no_text_trains_from_pictures_alone(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    for label in ("circle", "square"):
        (folder / label).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (50 * index, 0, 0)).save(folder / label / f"{index}.png")
    source = f"data.sources=[{{kind: folder, path: {folder}, folder_condition: shape}}]"
    shape = "stage.conditions={shape: {kind: class, labels: [circle, square]}}"
    run = trainer(micro_config(tmp_path / "run", "stage.model.text=none", source, shape, "training.sample_every=4"))
    assert run.run()
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()
    plain = micro_config(
        tmp_path / "plain", "stage.model.text=none", f"data.sources=[{{kind: folder, path: {folder}}}]"
    )
    assert trainer(plain).run()


def test_records_without_a_caption_count_as_dropped_where_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_records(tmp_path / "data", caption=lambda index: "words" if index % 2 else None)
    config = micro_config(
        tmp_path / "run",
        f"data.sources=[{{kind: folder, path: {folder}}}]",
        "data.uncaptioned=drop",
        "data.caption_dropout=0.0",
    )
    data = batches(config.data, config.stage, 0, batch_size=8)
    captions = sorted(next(data).captions) + sorted(next(data).captions)
    assert captions == [*[""] * 4, *["words"] * 4] * 2
    assert [record.message for record in caplog.records] == [
        "some records have no caption; they are trained as if it were dropped"
    ]


def test_a_missing_column_is_one_line(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "data", caption=lambda _: "x")
    config = micro_config(
        tmp_path / "run",
        "stage.conditions={age: {kind: number, range: [0.0, 9.0]}}",
        f"data.sources=[{{kind: folder, path: {folder}}}]",
    )
    with pytest.raises(CascadeError, match=r"no column 'age'; the columns are caption, file_name; name the column of"):
        next(batches(config.data, config.stage, 0, batch_size=4))


def test_a_stage_s_settings_may_be_taken_from_another_and_changed(tmp_path: Path) -> None:
    config = load_train_config(Path("configs/fine-tune/layout.yaml"), [f"output={tmp_path / 'run'}"])
    base = load_train_config(Path("configs/fine-tune/base.yaml")).stage
    assert config.stage == base.model_copy(update={"conditions": config.stage.conditions})
    assert list(config.stage.conditions) == ["layout"]
    assert config.text.reading == load_train_config(Path("configs/fine-tune/base.yaml")).text.reading


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_a_layout_is_added_to_a_trained_stage_whose_own_weights_stay(how: str, tmp_path: Path) -> None:
    assert trainer(micro_config(tmp_path / "first", "training.steps=1")).run()
    base = load_stage(tmp_path / "first" / "stage")
    folder = write_records(tmp_path / "data", layout=lambda index: f"{index}.png", caption=lambda _: "x")
    changes = ["training.frozen=['*']"] if how == "frozen" else ["training.lora_rank=2", "training.lora_layers=all"]
    config = micro_config(
        tmp_path / "second",
        f"training.init_from={tmp_path / 'first' / 'stage'}",
        "stage.conditions={layout: {kind: picture}}",
        f"data.sources=[{{kind: folder, path: {folder}}}]",
        "training.trained=[conditions]",
        *changes,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_training.fill", lambda *_: None)  # fresh readers, as in a real run
        run = trainer(config)
    cond = replace(text(2), given=joined({"layout": LAYOUT}, [{"layout": None}] * 2, SIZE))
    with torch.inference_mode():
        run.stage.network.eval()
        assert torch.equal(run.stage.network(*noise(), cond), base.network(*noise(), text(2)))
        run.stage.network.train()
    assert run.run()
    after = load_stage(tmp_path / "second" / "stage").network.state_dict()
    before = base.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before) == (how == "frozen")
    assert any(after[name].any() for name in after if name.startswith("conditions.of_layout.out"))
