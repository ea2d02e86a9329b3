"""Prompt files become records, records jobs, jobs pictures, and pictures a folder with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import make_tiny_cascade
from PIL import Image

from cascade import CascadeError, CascadePipeline
from cascade.batch import DrawOptions, Engine, Output, Shelf, Summary, Task, Undrawn, plan, run_batch
from cascade.prompts import Failure, PromptRecord, given_prompts, read_prompts
from cascade.seeds import MAX_SEED, derive_seed


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> CascadePipeline:
    return CascadePipeline.from_pretrained(make_tiny_cascade(tmp_path_factory.mktemp("m") / "tiny"), device="cpu")


def read(tmp_path: Path, name: str, content: str | bytes, run_seed: int = 0) -> list[PromptRecord | Failure]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_prompts(str(path), run_seed))


def good(records: Iterable[PromptRecord | Failure]) -> list[PromptRecord]:
    return [record for record in records if isinstance(record, PromptRecord)]


def bad(records: Iterable[PromptRecord | Failure]) -> list[str]:
    """Failures as `line: reason`."""
    return [str(record).rpartition("/")[2].partition(":")[2] for record in records if isinstance(record, Failure)]


# --- reading -----------------------------------------------------------------------------------------------


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    records = read(tmp_path, "p.txt", "\ufeffa red apple\r\n\n  two stars  \nключ 🦊")
    assert [(r.index, r.prompt) for r in good(records)] == [(0, "a red apple"), (1, "two stars"), (2, "ключ 🦊")]
    assert [r.origin.rpartition(":")[2] for r in good(records)] == ["1", "3", "4"]


def test_json_lines_are_strings_or_objects(tmp_path: Path) -> None:
    lines = ['"a fox"', '{"prompt": "a star", "id": 7, "seed": 3, "num_images": 2, "steps": {"base": 4}}']
    fox, star = good(read(tmp_path, "p.jsonl", "\n".join(lines)))
    assert fox.prompt == "a fox"
    assert star == replace(star, prompt="a star", id="7", seed=3, num_images=2, steps={"base": 4})


def test_csv_cells_become_what_json_would_hold(tmp_path: Path) -> None:
    table = 'prompt,seed,guidance,steps,negative_prompt\n"a fox, red",5,2.5,"base=3,sr16=1",\n"two\nlines",,,4,dull\n'
    fox, lines = good(read(tmp_path, "p.csv", table))
    assert fox == replace(
        fox, prompt="a fox, red", seed=5, guidance=2.5, steps={"base": 3, "sr16": 1}, negative_prompt=None
    )
    assert lines == replace(lines, prompt="two\nlines", guidance=None, steps=4, negative_prompt="dull")
    assert lines.origin.endswith(":3")


BAD_JSON = {
    '{"prompt": "a"': "not valid JSON",
    "[1]": "expected a JSON string or object",
    '{"seed": 3}': "prompt is missing",
    '{"prompt": " "}': "prompt is missing",
    '{"prompt": 3}': "prompt: expected text, found 3",
    '{"prompt": "a", "sed": 3}': "'sed' is not a column; did you mean seed?",
    '{"prompt": "a", "seed": "3"}': 'seed: expected a whole number in 0..9223372036854775807, found "3"',
    '{"prompt": "a", "seed": true}': "seed: expected a whole number",
    '{"prompt": "a", "seed": -1}': "seed: expected a whole number",
    '{"prompt": "a", "num_images": 0}': "num_images: expected a whole number in 1..",
    '{"prompt": "a", "guidance": NaN}': "guidance: expected a number of at least 0, found NaN",
    '{"prompt": "a", "steps": {"base": "x"}}': 'steps.base: expected a whole number in 1..1000000, found "x"',
    '{"prompt": "a", "id": ""}': "id: is empty",
    '{"prompt": "a", "id": [1]}': "id: expected text, found [1]",
    '{"prompt": "a", "guidance": 1' + "0" * 400 + "}": "a number of many digits",
    '{"prompt": "a", "seed": 1' + "0" * 5000 + "}": "not valid JSON",
    "[" * 100_000: "not valid JSON",
}


def test_bad_lines_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [*BAD_JSON, '{"prompt": "good", "id": "x"}', '{"prompt": "late", "id": "x"}']
    records = read(tmp_path, "p.jsonl", "\n".join(lines).encode() + b'\n"not \xff utf-8"\n"last"')
    assert [record.prompt for record in good(records)] == ["good", "last"]
    reasons = [*BAD_JSON.values(), "id: 'x' stands on an earlier line", "not UTF-8"]
    numbers = [*range(1, len(BAD_JSON) + 1), len(BAD_JSON) + 2, len(BAD_JSON) + 3]
    failures = bad(records)
    assert len(failures) == len(reasons)
    for failure, number, reason in zip(failures, numbers, reasons, strict=True):
        assert failure.startswith(f"{number}: ")
        assert reason in failure
        assert "\n" not in failure


def test_bad_csv_rows_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    rows = ["prompt,seed,steps", "a fox,x,", "a", "good,1,", ",2,", "b,,base=x", '"' + "long" * 50_000, "last,,"]
    records = read(tmp_path, "p.csv", "\n".join(rows).encode() + b"\n\xff,,\n")
    assert [record.prompt for record in good(records)] == ["good", "last"]
    assert [failure.partition(";")[0][:60] for failure in bad(records)] == [
        "2: seed: 'x' is not a whole number",
        "3: 1 cells, the header has 3",
        "5: prompt is missing",
        "6: steps: 'x' is not a whole number",
        "7: not valid CSV: field larger than field limit (131072)",
        "9: not UTF-8",
    ]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_file_without_prompts_is_refused_at_once(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CascadeError, match="no prompts in it"):
        read_prompts(str(tmp_path / name), 0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt,sed", "p.csv:1: 'sed' is not a column; did you mean seed?"),
        ("seed,id", "among them prompt"),
        ("prompt,prompt", "each column once"),
    ],
)
def test_a_wrong_csv_header_is_refused_at_once(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(f"{header}\na,b\n")
    with pytest.raises(CascadeError, match=message):
        read_prompts(str(tmp_path / "p.csv"), 0)


def test_a_file_is_read_no_further_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a line of text\n" * 100_000)
    records = read_prompts(str(tmp_path / "p.txt"), 0)
    assert next(records)
    (tmp_path / "p.txt").write_bytes(b"")
    assert len(list(records)) < 2_000
    records.close()


# --- seeds -------------------------------------------------------------------------------------------------


def test_a_line_without_a_seed_gets_one_from_its_id_or_its_text_and_how_often_that_occurred(tmp_path: Path) -> None:
    lines = ['"a"', '{"prompt": "b", "id": "x"}', '"a"', '{"prompt": "a", "seed": 5}', '"a"']
    assert [record.seed for record in good(read(tmp_path, "p.jsonl", "\n".join(lines), run_seed=9))] == [
        derive_seed(9, "text", "a", 0),
        derive_seed(9, "id", "x"),
        derive_seed(9, "text", "a", 1),
        5,
        derive_seed(9, "text", "a", 3),
    ]


def test_neither_the_order_of_other_lines_nor_bad_ones_change_a_seed(tmp_path: Path) -> None:
    one = good(read(tmp_path, "1.jsonl", '"a"\n"b"\n"a"'))
    other = good(read(tmp_path, "2.jsonl", '"a"\nbad\n"c"\n"a"\n"b"'))
    seeds = [{(record.prompt, record.seed) for record in records} for records in (one, other)]
    assert seeds[0] < seeds[1]


def test_on_the_command_line_the_seed_holds_for_each_prompt() -> None:
    assert [record.seed for record in given_prompts(["a", "b"], 7)] == [7, 7]


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


def tasks(pipeline: CascadePipeline, records: Iterable[PromptRecord], call: DrawOptions) -> list[Task]:
    return [task for record in records for task in plan(pipeline, record, call).tasks()]


def batches(pipeline: CascadePipeline, records: list[PromptRecord], call: DrawOptions) -> list[int]:
    """Pictures in each call of the network of the last stage; those that fill it up to its size count."""
    counts: list[int] = []
    draw_batch = pipeline.draw_batch

    def watched(*arguments: Any) -> Any:
        counts.append(len(arguments[3]))
        return draw_batch(*arguments)

    pipeline.draw_batch = watched  # type: ignore[method-assign]
    try:
        drawn = list(Engine(pipeline, call).draw(tasks(pipeline, records, call)))
    finally:
        del pipeline.draw_batch
    assert len(drawn) == len(tasks(pipeline, records, call))
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
        results = list(Engine(pipeline, call, shelf=shelf).draw(tasks(pipeline, records, call)))
        drawn.append({result.task.job.record.index: result.image.tobytes() for result in results})
    expected = pipeline([record.prompt for record in records], seed=3).images
    assert drawn == [{index: image.tobytes() for index, image in enumerate(expected)}] * 2
    assert not list(tmp_path.iterdir())


def test_each_text_is_encoded_once(pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    engine = Engine(pipeline, options())
    for prompts in (["a", "b", "a"], ["b", "c"]):
        records = [PromptRecord(index, prompt, index) for index, prompt in enumerate(prompts)]
        assert len(list(engine.draw(tasks(pipeline, records, options())))) == len(prompts)
    assert seen == ["a", "", "b", "c"]


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = pipeline.draw_batch

    def limited(*arguments: Any) -> Any:
        if len(arguments[3]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(*arguments)

    records = [PromptRecord(index, "a", index) for index in range(5)]
    monkeypatch.setattr(pipeline, "draw_batch", limited)
    monkeypatch.setattr("cascade.batch.engine._AUTO_BATCH_ON_CPU", 16)
    call = options(batch_size="auto")
    results = list(Engine(pipeline, call).draw(tasks(pipeline, records, call)))
    assert [result.batch_sizes["base"] for result in results] == [2] * 5
    fixed = Engine(pipeline, options(batch_size=2)).draw(tasks(pipeline, records, call))
    assert [result.image.tobytes() for result in results] == [result.image.tobytes() for result in fixed]
    with pytest.raises(CascadeError, match="out of memory in stage base"):
        list(Engine(pipeline, options(batch_size=4)).draw(tasks(pipeline, records, call)))


def test_the_pieces_of_work_do_not_depend_on_the_memory_that_a_process_finds_free(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or processes would cut the prompts differently, and leave some to nobody."""
    windows = []
    for pages in (1, 10**9):
        monkeypatch.setattr("os.sysconf", lambda name, pages=pages: pages if name == "SC_AVPHYS_PAGES" else 4096)
        windows.append(Engine(pipeline, options(batch_size="auto")).window)
    assert windows == [4, 4]


def test_a_picture_that_is_not_finite_is_marked_and_others_go_on(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = pipeline.draw_batch

    def spoiled(*arguments: Any) -> Any:
        x = draw_batch(*arguments)
        x[[picture.seed == 1 for picture in arguments[3]]] = float("nan")
        return x

    monkeypatch.setattr(pipeline, "draw_batch", spoiled)
    call = options(batch_size=2, until=16)
    records = [PromptRecord(index, "a", index) for index in range(4)]
    results = list(Engine(pipeline, call).draw(tasks(pipeline, records, call)))
    bad = [result for result in results if isinstance(result, Undrawn)]
    assert [(result.task.job.record.index, result.reason[:10]) for result in bad] == [(1, "stage base")]
    assert {result.task.job.record.index for result in results} == {0, 1, 2, 3}


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
    assert Task(job, 1).stem == stem
    assert len(stem) <= 60


def run(pipeline: CascadePipeline, out: Path, records: Iterable[PromptRecord | Failure], **changes: Any) -> Summary:
    with Output(out) as output:
        output.begin({"seed": 0})
        summary = run_batch(pipeline, records, options(**{"until": None, "save_stages": True, **changes}), output)
        output.complete()
        output.write_grid()
    return summary


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
