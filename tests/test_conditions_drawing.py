"""Drawing with conditions other than text: pipeline, command line, recipes, prompt files and continued runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import TEXT_DIM, make_tiny_cascade, tiny_stage, tiny_stage_config
from helpers_text import make_tiny_t5
from PIL import Image
from torch import Tensor

from cascade import CascadeError, CascadePipeline, TextEncoder
from cascade.batch.request import BatchRequest, generate_files
from cascade.cli.program import main
from cascade.conditions.settings import ClassCondition, NumberCondition, PictureCondition
from cascade.conditions.values import recorded, settled
from cascade.config.stage import read_stage_config
from cascade.storage.stage import load_stage

SHAPE = ClassCondition(labels=("circle", "square", "star"))
AGE = NumberCondition(range=(0.0, 100.0))
LAYOUT = PictureCondition()


def outline(value: int = 200) -> Image.Image:
    image = Image.new("L", (8, 8))
    image.paste(value, (2, 2, 6, 6))
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade 8 -> 16 px whose base reads a class, a number and a picture, and whose second stage another picture."""
    folder = tmp_path_factory.mktemp("conditioned") / "model"
    encoder = TextEncoder.from_pretrained(make_tiny_t5(folder.with_name("t5"), TEXT_DIM), max_length=48)
    base = {"shape": SHAPE, "age": AGE.model_copy(update={"default": "none"}), "layout": LAYOUT}
    edges = {"edges": PictureCondition(channels=3, default="none")}
    configs = [
        tiny_stage_config("base", 8, conditions=base),
        tiny_stage_config("sr16", 16, 8, conditions=edges),
    ]
    stages = [tiny_stage(config, seed) for seed, config in enumerate(configs)]
    CascadePipeline(encoder, stages, name="conditioned", license="CC0-1.0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def pixels(pipeline: CascadePipeline, conditions: Any, prompt: str | list[str] | None = "a fox", **more: Any) -> Tensor:
    drawn = pipeline(prompt, seed=1, conditions=conditions, output_type="pt", **more).images
    return drawn if isinstance(drawn, Tensor) else torch.stack(list(drawn))


NEEDED: dict[str, Any] = {"shape": "star", "layout": outline()}


@pytest.mark.parametrize(
    "change", [{"shape": "circle"}, {"age": 3}, {"layout": outline(90)}, {"edges": Image.new("RGB", (16, 16), "red")}]
)
def test_every_condition_changes_the_picture(pipeline: CascadePipeline, change: dict[str, Any]) -> None:
    assert not torch.equal(pixels(pipeline, NEEDED), pixels(pipeline, {**NEEDED, **change}))


def test_a_picture_with_conditions_does_not_depend_on_its_batch(pipeline: CascadePipeline) -> None:
    other = {"shape": "circle", "age": 90, "layout": "none"}
    both = pixels(pipeline, [NEEDED, other], ["a fox", "a fox"], batch_size=2)
    swapped = pixels(pipeline, [other, NEEDED], ["a fox", "a fox"], batch_size=2)
    assert torch.equal(both[0], swapped[1])
    assert not torch.equal(both[0], both[1])


def test_a_prompt_may_be_left_out_with_conditions(pipeline: CascadePipeline) -> None:
    assert torch.equal(pixels(pipeline, NEEDED, None), pixels(pipeline, NEEDED, ""))


def test_other_sizes_fit_the_layout(pipeline: CascadePipeline) -> None:
    assert pixels(pipeline, NEEDED, height=32, width=16).shape[-2:] == (32, 16)


def test_the_pipeline_names_what_it_reads(pipeline: CascadePipeline) -> None:
    with pytest.raises(CascadeError, match=r"condition shape is missing; this model reads shape .* layout .* edges"):
        pipeline("a fox", seed=1)
    with pytest.raises(CascadeError, match=r"conditions: 1 for 2 prompts"):
        pipeline(["a", "b"], seed=1, conditions=[NEEDED])
    with pytest.raises(CascadeError, match=r"guidance_of: no condition is called 'lay'.*did you mean layout"):
        pipeline("a", seed=1, conditions=NEEDED, guidance_of={"lay": 2.0})


def test_single_weights_change_the_picture_of_stages_that_read_the_condition(pipeline: CascadePipeline) -> None:
    plain = pixels(pipeline, NEEDED, until=8)
    assert not torch.equal(plain, pixels(pipeline, NEEDED, until=8, guidance_of={"layout": 6.0}))
    assert torch.equal(plain, pixels(pipeline, NEEDED, until=8, guidance_of={"edges": 6.0}))


def test_upscaling_reads_the_conditions_of_its_stages(pipeline: CascadePipeline) -> None:
    start = Image.new("RGB", (8, 8), "blue")
    edges = Image.new("RGB", (16, 16), "red")
    one, other = (
        pipeline.upscale(start, seed=1, to=16, conditions=given, output_type="pt").images
        for given in ({}, {"edges": edges})
    )
    assert not torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_recipes_hold_labels_numbers_and_digests(pipeline: CascadePipeline) -> None:
    values = settled([slot.config.conditions for slot in pipeline.slots], {**NEEDED, "age": 3})
    entries = recorded(values)
    assert (entries["shape"], entries["age"], entries["edges"]) == ("star", 3.0, None)
    assert str(entries["layout"]).startswith("sha256:")


def cli(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """(exit status, everything printed)."""
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_generate_records_conditions_and_draws_the_picture_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outline().save(tmp_path / "layout.png")
    outline(90).save(tmp_path / "other.png")
    out, layout = tmp_path / "out", ("--condition", f"layout={tmp_path / 'layout.png'}")
    common = ("--model", model, "--device", "cpu")
    given = ("--condition", "shape=star", *layout, "--guidance-of", "age=2", "--seed", "3", "--until", "8")
    assert cli(capsys, "generate", *common, *given, "--out", out)[0] == 0
    (line,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert (line["conditions"]["shape"], line["conditions"]["age"]) == ("star", None)
    picture = out / line["file"]
    assert json.loads(Image.open(picture).text["conditions"]) == line["conditions"]  # type: ignore[attr-defined]
    again = ("generate", "--from-image", picture, *common, "--out", tmp_path / "again")
    status, printed = cli(capsys, *again)
    assert status == 2
    assert "condition layout: was a picture or vector; name the same with --condition layout=FILE" in " ".join(
        printed.split()
    )
    _, printed = cli(capsys, *again, "--condition", f"layout={tmp_path / 'other.png'}")
    assert "condition layout: is not the one that the picture was drawn with" in " ".join(printed.split())
    status, printed = cli(capsys, *again, *layout)
    assert (status, "the same bytes" in printed) == (0, True), printed


def test_options_of_conditions_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (("--condition", "age"), ("--condition", "a=1", "--condition", "a=2"), ("--guidance-of", "2")):
        status, printed = cli(capsys, "generate", "a fox", *option)
        assert status == 2
        assert "expected" in printed


def test_a_line_of_a_prompt_file_has_its_own_conditions_and_fails_alone(model: Path, tmp_path: Path) -> None:
    outline().save(tmp_path / "layout.png")
    call: dict[str, Any] = {"model": str(model), "seed": 1, "device": "cpu", "until": 8}
    call["conditions"] = {"layout": str(tmp_path / "layout.png")}
    lines = [
        {"prompt": "a fox", "shape": "star"},
        {"shape": "circle", "age": 3},
        {"prompt": "a fox", "shape": "blob"},
        {"prompt": "a fox", "colour": "red"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    outcome = generate_files(tmp_path / "p.jsonl", tmp_path / "out", **call)
    assert (outcome.pictures, outcome.failures) == (2, 2)
    entries = [
        json.loads(line)["conditions"] for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    ]
    assert [(entry["shape"], entry["age"]) for entry in entries] == [("star", None), ("circle", 3.0)]
    failures = (tmp_path / "out" / "failures.jsonl").read_text()
    assert "condition shape: 'blob' is not one of" in failures
    assert "'colour' is not a column" in failures
    (tmp_path / "p.csv").write_text("prompt,shape,age\na fox,star,\na fox,square,7\n")
    table = generate_files(tmp_path / "p.csv", tmp_path / "csv", **call)
    assert (table.pictures, table.failures) == (2, 0)


def test_a_continued_run_keeps_equal_conditions_and_refuses_others(model: Path, tmp_path: Path) -> None:
    def run(shape: str) -> BatchRequest:
        return BatchRequest(
            out=str(tmp_path / "out"),
            prompts=["a fox"],
            model=str(model),
            seed=1,
            device="cpu",
            until=8,
            conditions={"shape": shape, "layout": "none"},
        )

    first = run("star").run()
    assert (first.pictures, run("star").run().kept) == (1, 1)
    with pytest.raises(CascadeError, match="was drawn from another prompt, seed or settings"):
        run("circle").run()


def test_a_model_without_conditions_says_that_it_reads_text_alone(tmp_path: Path) -> None:
    plain = CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path / "tiny"), device="cpu")
    with pytest.raises(CascadeError, match="condition 'age': this model reads text alone"):
        plain("a fox", seed=1, conditions={"age": 3})


def test_stage_folders_keep_their_conditions(model: Path) -> None:
    assert list(read_stage_config(model / "base").conditions) == ["shape", "age", "layout"]
    assert load_stage(model / "base").config.conditions["shape"] == SHAPE


def test_info_lists_the_conditions_of_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "condition shape: one of 'circle', 'square', 'star'; none leaves it open" in shown
    assert "condition age: " in shown
    assert main(["info", str(model), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["conditions"]) == ["shape", "age", "layout", "edges"]


def test_upscale_takes_conditions_and_draws_again_when_one_changes(
    model: Path, pipeline: CascadePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, edges = tmp_path / "small.png", tmp_path / "edges.png"
    Image.new("RGB", (8, 8), "blue").save(small)
    Image.new("RGB", (16, 16), "red").save(edges)
    command = ["upscale", str(small), "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, "--condition", f"edges={edges}"]) == 0
    (expected,) = pipeline.upscale(Image.open(small), seed=0, conditions={"edges": Image.open(edges)}).images
    with Image.open(tmp_path / "out" / "small.png") as drawn:
        assert drawn.convert("RGB").tobytes() == expected.tobytes()
    assert main([*command, "--condition", f"edges={edges}"]) == 0
    assert "kept" in capsys.readouterr().out
    Image.new("RGB", (16, 16), "green").save(edges)
    assert main([*command, "--condition", f"edges={edges}"]) == 2
    assert "exists, but from another call" in capsys.readouterr().err
    assert main([*command, "--condition", "edge=x"]) == 2
    assert "did you mean edges?" in capsys.readouterr().err


def test_a_matrix_has_an_axis_for_a_condition(
    model: Path, pipeline: CascadePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layout.png"
    outline().save(path)
    command = ["generate", "a fox", "--model", str(model), "--device", "cpu", "--seed", "1", "--until", "8"]
    command += ["--condition", f"layout={path}", "--out", str(tmp_path / "out")]
    axes = ["--matrix", "condition.shape=circle,star", "--matrix", "condition.age=3,none,90"]
    assert main([*command, *axes]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: line["index"])
    assert [(line["conditions"]["shape"], line["conditions"]["age"]) for line in lines] == [
        *(("circle", 3.0), ("star", 3.0), ("circle", None), ("star", None), ("circle", 90.0), ("star", 90.0))
    ]
    expected = pipeline("a fox", seed=1, until=8, conditions={"shape": "star", "age": 90, "layout": outline()})
    with Image.open(tmp_path / "out" / lines[-1]["file"]) as drawn:
        assert drawn.convert("RGB").tobytes() == expected.images[0].tobytes()
    assert (tmp_path / "out" / "matrix.png").exists()
    assert main([*command, "--matrix", "condition.shape=circle,blob", "--overwrite"]) == 2
    assert "'blob' is not one of" in capsys.readouterr().err
    assert main([*command, "--matrix", "condition.=1", "--overwrite"]) == 2
    assert "expected condition.NAME or one of" in capsys.readouterr().err
