"""Records become jobs, jobs pictures, and pictures a folder with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError, CascadePipeline
from cascade.batch.output import Output
from cascade.batch.plan import DrawOptions, Planner, Target, plan
from cascade.batch.reports import write_grid
from cascade.batch.run import Summary, run_batch
from cascade.drawing.batches import draw_batch
from cascade.drawing.engine import Engine
from cascade.drawing.task import Drawn, Result, Shelf, Undrawn
from cascade.pictures.images import to_pil
from cascade.prompts.reading import given_prompts
from cascade.prompts.records import Failure, PromptRecord
from cascade.seeds import MAX_SEED


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"), device="cpu")


# --- planning and drawing ----------------------------------------------------------------------------------


def options(**changes: Any) -> DrawOptions:
    return DrawOptions(**{"run_seed": 0, "until": 8, **changes})


def test_a_line_overrides_the_call(pipeline: CascadePipeline) -> None:
    call = options(num_images=2, negative_prompt="dull", sampling={"steps": 5, "guidance": 3.0, "sampler": None})
    plain = plan(pipeline, PromptRecord(0, "a", 1), call)
    assert (plain.num_images, plain.negative_prompt, plain.settings["base"].steps) == (2, "dull", 5)
    record = PromptRecord(1, "a", 1, negative_prompt="", num_images=3, steps={"sr16": 4}, guidance=1.0)
    own = plan(pipeline, record, call)
    assert (own.num_images, own.negative_prompt) == (3, "")
    assert [own.settings[name].steps for name in ("base", "sr16")] == [2, 4]
    assert own.settings["sr32"].guidance == 1.0


def targets(pipeline: CascadePipeline, records: Iterable[PromptRecord], call: DrawOptions) -> list[Target]:
    return [target for record in records for target in plan(pipeline, record, call).targets()]


def draw(
    pipeline: CascadePipeline,
    records: Iterable[PromptRecord],
    call: DrawOptions,
    shelf: Shelf | None = None,
    engine: Engine | None = None,
) -> list[tuple[Target, Result]]:
    """Results in the order in which they come, each beside what it was to become."""
    tasks = {target.task(): target for target in targets(pipeline, records, call)}
    engine = engine or pipeline.engine(call.conduct(), shelf)
    return [(tasks[result.task], result) for result in engine.draw(list(tasks))]


def pixels_of(result: Result) -> bytes:
    assert isinstance(result, Drawn)
    return to_pil(result.pixels[-1][None])[0].tobytes()


def batches(pipeline: CascadePipeline, records: list[PromptRecord], call: DrawOptions) -> list[int]:
    """Pictures in each call of the network of the last stage; those that fill it up to its size count."""
    counts: list[int] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        counts.append(len(arguments[1].pictures))
        return draw_batch(*arguments, **more)

    with patch("cascade.drawing.engine.draw_batch", watched):
        drawn = draw(pipeline, records, call)
    assert len(drawn) == len(targets(pipeline, records, call))
    return counts


def test_pictures_with_equal_settings_share_batches_of_one_size(pipeline: CascadePipeline) -> None:
    records = [PromptRecord(index, "a", index) for index in range(5)]
    assert batches(pipeline, records, options()) == [1] * 5
    assert batches(pipeline, records, options(batch_size=2)) == [2, 2, 2]
    assert batches(pipeline, records, options(batch_size=4, num_images=2)) == [4, 4, 4]
    mixed = [replace(record, steps=record.index % 2 + 1) for record in records]
    assert batches(pipeline, mixed, options(batch_size=3)) == [3, 3]


def test_windows_and_the_disk_change_no_bytes(pipeline: CascadePipeline, tmp_path: Path) -> None:
    records = [PromptRecord(index, prompt, 3) for index, prompt in enumerate(["a fox", "two blue stars", "a"])]
    drawn = []
    for shelf in (None, Shelf(tmp_path)):
        call = options(until=None)
        results = draw(pipeline, records, call, shelf)
        drawn.append({target.job.record.index: pixels_of(result) for target, result in results})
    expected = pipeline([record.prompt for record in records], seed=3).images
    assert drawn == [{index: image.tobytes() for index, image in enumerate(expected)}] * 2
    assert not list(tmp_path.iterdir())


def test_a_restart_goes_on_from_the_smaller_pictures_that_it_finds(pipeline: CascadePipeline, tmp_path: Path) -> None:
    call = options(until=None)
    records = [PromptRecord(index, "a", index) for index in range(3)]
    seen: list[str] = []

    def dies_in_the_last_stage(stage: Any, *arguments: Any, **more: Any) -> Any:
        if stage.name == "sr32":
            raise KeyboardInterrupt
        return draw_batch(stage, *arguments, **more)

    def watched(stage: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(stage.name)
        return draw_batch(stage, *arguments, **more)

    with patch("cascade.drawing.engine.draw_batch", dies_in_the_last_stage), pytest.raises(KeyboardInterrupt):
        draw(pipeline, records, call, Shelf(tmp_path))
    assert len(list(tmp_path.iterdir())) == 6  # two smaller ones of each
    with patch("cascade.drawing.engine.draw_batch", watched):
        results = draw(pipeline, records, call, Shelf(tmp_path))
    assert seen == ["sr32"] * 3
    expected = pipeline(["a"] * 3, seed=[0, 1, 2]).images
    assert [pixels_of(result) for _, result in results] == [image.tobytes() for image in expected]
    assert not list(tmp_path.iterdir())


def test_each_text_is_encoded_once(pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    engine = pipeline.engine()
    for prompts in (["a", "b", "a"], ["b", "c"]):
        records = [PromptRecord(index, prompt, index) for index, prompt in enumerate(prompts)]
        assert len(draw(pipeline, records, options(), engine=engine)) == len(prompts)
    assert seen == ["a", "", "b", "c"]


def test_texts_in_use_stay_and_others_make_room(pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    monkeypatch.setattr("cascade.drawing.texts.KEPT", 2)
    engine = pipeline.engine()
    for index, prompt in enumerate(["a", "b", "c", "a"]):
        draw(pipeline, [PromptRecord(index, prompt, index)], options(), engine=engine)
    assert seen == ["a", "", "b", "c", "a"]  # the empty text is what every picture is guided away from


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(*arguments: Any, **more: Any) -> Any:
        if len(arguments[1].pictures) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(*arguments, **more)

    records = [PromptRecord(index, "a", index) for index in range(5)]
    monkeypatch.setattr("cascade.drawing.engine.draw_batch", limited)
    monkeypatch.setattr("cascade.drawing.engine._LARGEST_ON_CPU", 16)
    call = options(batch_size="auto")
    results = draw(pipeline, records, call)
    assert [isinstance(result, Drawn) and result.batch_sizes["base"] for _, result in results] == [2] * 5
    fixed = draw(pipeline, records, options(batch_size=2))
    assert [pixels_of(result) for _, result in results] == [pixels_of(result) for _, result in fixed]
    with pytest.raises(CascadeError, match="out of memory in stage base"):
        draw(pipeline, records, options(batch_size=4))


def test_the_pieces_of_work_do_not_depend_on_the_memory_that_a_process_finds_free(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or processes would cut the prompts differently, and leave some to nobody."""
    windows = []
    for free in (1, 10**13):
        monkeypatch.setattr("cascade.drawing.engine.free_bytes", lambda _device, free=free: free)
        call = options(batch_size="auto")
        windows.append(Planner(pipeline, call).window(pipeline.engine(call.conduct()).batch_sizes))
    assert windows == [4, 4]


def test_a_picture_that_is_not_finite_is_marked_and_others_go_on(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: Any, **more: Any) -> Any:
        x = draw_batch(*arguments, **more)
        x[[picture.seed == 1 for picture in arguments[1].pictures]] = float("nan")
        return x

    monkeypatch.setattr("cascade.drawing.engine.draw_batch", spoiled)
    call = options(batch_size=2, until=16)
    records = [PromptRecord(index, "a", index) for index in range(4)]
    results = draw(pipeline, records, call)
    bad = [(target, result.reason) for target, result in results if isinstance(result, Undrawn)]
    assert [(target.job.record.index, reason[:10]) for target, reason in bad] == [(1, "stage base")]
    assert {target.job.record.index for target, _ in results} == {0, 1, 2, 3}


# --- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "count", "stem"),
    [
        ("A red apple, noto style!", 1, "000007-a-red-apple-noto-style"),
        ("Crème brûlée", 2, "000007-1-creme-brulee"),
        ("🦊 ключ", 1, "000007"),
        ("../../etc/passwd", 1, "000007-etc-passwd"),
        ("word " * 100, 1, "000007" + "-word" * 10 + "-wor"),
    ],
)
def test_files_are_named_by_number_and_slug(pipeline: CascadePipeline, prompt: str, count: int, stem: str) -> None:
    job = plan(pipeline, PromptRecord(7, prompt, 0), options(num_images=count))
    assert Target(job, 1).stem == stem
    assert len(stem) <= 60


def run(pipeline: CascadePipeline, out: Path, records: Iterable[PromptRecord | Failure], **changes: Any) -> Summary:
    with Output(out) as output:
        output.begin({"seed": 0})
        summary = run_batch(pipeline, records, options(**{"until": None, "save_stages": True, **changes}), output)
        output.complete()
        output.write_with("grid", ".png", lambda path: write_grid(output.manifest.entries(), output.read, path))
    return summary


def test_a_contact_sheet_names_the_picture_that_is_damaged(tmp_path: Path) -> None:
    entries = [{"file": "000000-a-fox.png", "prompt": "a fox"}]
    with pytest.raises(CascadeError, match=r"^000000-a-fox\.png: not a readable picture"):
        write_grid(entries, lambda _name: b"\x89PNG\r\n", tmp_path / "grid.png")


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_the_manifest_says_what_each_picture_is(pipeline: CascadePipeline, tmp_path: Path) -> None:
    records = [PromptRecord(0, "ключ 🦊", MAX_SEED, id="key"), Failure("f:2", "bad"), PromptRecord(2, "a", 4)]
    assert run(pipeline, tmp_path / "out", records, num_images=2) == Summary(pictures=4, failures=1)
    lines = manifest(tmp_path / "out")
    assert [(line["id"], line["number"], line["file"]) for line in lines] == [
        ("key", 0, "000000-0.png"),
        ("key", 1, "000000-1.png"),
        ("000002", 0, "000002-0-a.png"),
        ("000002", 1, "000002-1-a.png"),
    ]
    for line in lines:
        content = (tmp_path / "out" / line["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == line["sha256"]
        picture = pipeline(line["prompt"], seed=line["seed"], num_images_per_prompt=line["number"] + 1).images[-1]
        assert Image.open(io.BytesIO(content)).tobytes() == picture.tobytes()
        assert line["seconds"] > 0
        assert list(line["stages"]) == ["8", "16"]
        for resolution, file in line["stages"].items():
            with Image.open(tmp_path / "out" / file) as smaller:
                assert smaller.size == (int(resolution), int(resolution))
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("[!.]*.*")}
    assert written == {
        "run.json",
        "failures.jsonl",
        "manifest.jsonl",
        "grid.png",
        *(line["file"] for line in lines),
        *(file for line in lines for file in line["stages"].values()),
    }


def test_a_picture_tells_what_drew_it(pipeline: CascadePipeline, tmp_path: Path) -> None:
    prompt = "ключ 🦊\nnew line\x00 and \ud83d half"
    records = list(given_prompts([prompt], 5))
    run(pipeline, tmp_path / "out", records, negative_prompt="blé", until=8)
    with Image.open(tmp_path / "out" / manifest(tmp_path / "out")[0]["file"]) as picture:
        text = picture.text
    assert text["prompt"] == records[0].prompt == prompt.replace("\ud83d", "\ufffd")
    assert (text["negative_prompt"], text["seed"], text["number"]) == ("blé", "5", "0")
    assert (text["model"], text["license"]) == ("tiny", "CC0-1.0")
    settings = json.loads(text["settings"])
    assert (settings["height"], settings["dtype"], settings["batch_size"]) == (8, "float32", 1)
    assert settings["stages"] == {"base": pipeline.slots[0].config.sampling.model_dump(mode="json")}


def test_a_line_whose_settings_this_cascade_refuses_is_named_and_the_others_go_on(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    records = [PromptRecord(0, "a", 1, origin="p:1", steps={"bse": 3}), PromptRecord(1, "b", 1)]
    assert run(pipeline, tmp_path / "out", records, until=8) == Summary(pictures=1, failures=1)
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["reason"].startswith("steps: no stage is called 'bse'")
    assert [line["index"] for line in manifest(tmp_path / "out")] == [1]


def test_pictures_that_were_finished_before_an_error_stay_and_are_in_the_manifest(
    pipeline: CascadePipeline, tmp_path: Path
) -> None:
    def records() -> Iterable[PromptRecord]:
        yield PromptRecord(0, "a", 1)
        yield PromptRecord(1, "b", 1)
        raise CascadeError("the disk is gone")

    with pytest.raises(CascadeError, match="disk"):
        run(pipeline, tmp_path / "out", records(), until=8)
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a", "b"]
