"""Prompt files of every kind are read as a stream of records; a wrong line is reported, the others are drawn."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import resource
import tracemalloc
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cascade import CascadeError
from cascade.prompts.reading import given_prompts, read_prompts
from cascade.prompts.records import Failure, PromptRecord
from cascade.prompts.sources import count_prompts, rows_of
from cascade.seeds import derive_seed


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
    '{"prompt": "a", "guidance": NaN}': "not valid JSON: NaN is not a JSON number",
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
    reasons = [*BAD_JSON.values(), "id: 'x' is used on an earlier line", "not UTF-8"]
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


def test_a_quote_inside_a_quoted_cell_is_reported_and_never_lost(tmp_path: Path) -> None:
    table = 'prompt,seed\n"a fox with a 12" hat",1\na 12" hat,2\n"a 12"" hat",3\n'
    records = read(tmp_path, "p.csv", table)
    assert [(record.prompt, record.seed) for record in good(records)] == [('a 12" hat', 2), ('a 12" hat', 3)]
    (failure,) = bad(records)
    assert failure.startswith("2: not valid CSV: ',' expected after '\"'; a quoted cell must end with a quote")


@pytest.mark.parametrize("later", ["a star,2\n", '"a star, red",2\n'])
def test_a_quote_that_is_not_closed_is_refused_with_the_line_where_it_began(tmp_path: Path, later: str) -> None:
    """Which of the rows below were meant to be rows cannot be known: none of them is swallowed or drawn."""
    table = 'prompt,seed\na dog,0\n"two\nlines",5\n' + '"a fox,1\n' + later * 300
    (tmp_path / "p.csv").write_text(table)
    records = read_prompts(str(tmp_path / "p.csv"), 0)
    assert [next(records).origin.rpartition(":")[2] for _ in range(2)] == ["2", "3"]
    with pytest.raises(CascadeError, match=r"p\.csv:5: the quote that begins a cell here is never closed"):
        next(records)


def test_the_line_of_an_unclosed_quote_is_that_of_its_cell(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,negative_prompt\n"two ""\nlines", a 12" hat\n"a\n","b\nc,d\n')
    with pytest.raises(CascadeError, match=r"p\.csv:5: the quote"):
        list(read_prompts(str(tmp_path / "p.csv"), 0))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_are_read_in_any_unicode_and_with_any_line_end(tmp_path: Path, encoding: str, end: str) -> None:
    foxes = [f"a fóx {number} " + "in a field of wheat " * 50 for number in range(200)]
    for name, lines in {
        "p.txt": foxes,
        "p.csv": ["prompt,seed", *(f"{fox},1" for fox in foxes)],
        "p.jsonl": [json.dumps(fox, ensure_ascii=False) for fox in foxes],
    }.items():
        content = end.join(lines).encode(encoding)
        if encoding == "utf-32":
            assert content.startswith(b"\xff\xfe\0\0")
        assert [record.prompt for record in good(read(tmp_path, name, content))] == [fox.strip() for fox in foxes]
        assert count_prompts(str(tmp_path / name)) == 200
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.txt").write_bytes(end.join(["a fox", "réd"]).encode(encoding))
    (caption,) = good(read_prompts(str(tmp_path / "captions"), 0))
    assert caption.prompt == "a fox\nréd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("日本語の狐\n赤い星\n".encode("utf-16-le"), "holds zero bytes"),
        ("prompt\n".encode("utf-16") + b"\0", "not UTF-16; save the file as UTF-8"),
        (b"PK\3\4\0\0\0\0\0\0\n", "holds zero bytes"),
    ],
)
def test_bytes_that_are_no_text_are_refused_and_never_drawn(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("p.txt", "p.jsonl", "p.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CascadeError, match=rf"{name}: {message}"):
            list(read_prompts(str(tmp_path / name), 0))
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.txt").write_bytes(content)
    (failure,) = read_prompts(str(tmp_path / "captions"), 0)
    assert message in str(failure)


def test_a_zero_byte_further_down_costs_its_line(tmp_path: Path) -> None:
    for name, line in {"p.txt": b"a\0b", "p.jsonl": rb'"a\u0000b"', "p.csv": b"a\0b"}.items():
        lines = [b'"a star"' if name == "p.jsonl" else b"prompt"] * 1000
        records = read(tmp_path, name, b"\n".join([*lines, line, lines[0]]))
        assert len(good(records)) == len(records) - 1
        assert bad(records) == ["1001: prompt: holds a zero byte, so it is not text; save the file as UTF-8"]


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
        ("seed,id", "including prompt"),
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


def test_parquet_and_folders_of_captions_are_prompts_too(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a fox", "seed": 5, "steps": {"base": 2, "sr16": None}, "id": None},
        {"prompt": "a star", "seed": None, "steps": None, "id": "star"},
        {"prompt": None, "seed": None, "steps": None, "id": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    fox, star, missing = read_prompts(str(tmp_path / "p.parquet"), 0)
    assert isinstance(fox, PromptRecord)
    assert isinstance(star, PromptRecord)
    assert (fox.prompt, fox.seed, fox.steps, fox.id) == ("a fox", 5, {"base": 2}, None)
    assert (star.id, star.steps) == ("star", None)
    assert str(missing) == f"{tmp_path / 'p.parquet'}:3: prompt is missing"
    folder = tmp_path / "captions"
    folder.mkdir()
    for name, content in {"b.txt": b"two\nlines", "a.txt": b" a fox\n", "c.txt": b"\xff", "d.md": b"no"}.items():
        (folder / name).write_bytes(content)
    a, b, c = read_prompts(str(folder), 0)
    assert isinstance(a, PromptRecord)
    assert isinstance(b, PromptRecord)
    assert [(a.id, a.prompt), (b.id, b.prompt)] == [("a", "a fox"), ("b", "two\nlines")]
    assert str(c) == f"{folder}/c.txt: not UTF-8; save the file as UTF-8"
    assert [count_prompts(str(tmp_path / name)) for name in ("p.parquet", "captions", "none.txt")] == [3, 3, None]


def test_tables_by_pandas_hold_whole_numbers_as_floats_and_nulls_as_nan(tmp_path: Path) -> None:
    """A column of whole numbers, some of them missing, becomes one of floats."""
    columns = {"prompt": ["a", "b", "c"], "seed": [5.0, float("nan"), 2.5], "num_images": [2.0, None, None]}
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    a, b, c = read_prompts(str(tmp_path / "p.parquet"), 0)
    assert isinstance(a, PromptRecord)
    assert isinstance(b, PromptRecord)
    assert (a.seed, a.num_images) == (5, 2)
    assert (b.seed, b.num_images) == (derive_seed(0, "text", "b", 0), None)
    assert str(c).endswith("p.parquet:3: seed: expected a whole number in 0..9223372036854775807, found 2.5")


def test_captions_come_in_the_order_of_their_names_whatever_the_folder_says(tmp_path: Path) -> None:
    names = [b"10.txt", b"9.txt", b"B.txt", b"a.txt", "é.txt".encode(), "🦊.txt".encode(), b"\xff.txt"]
    for name in reversed(names):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text("a fox")
    *records, last = read_prompts(str(tmp_path), 0)
    assert [record.id for record in good(records)] == [name.decode().removesuffix(".txt") for name in names[:-1]]
    # A name that is not UTF-8 cannot be an id; it is told as far as it can be shown.
    assert str(last) == f"{tmp_path}/\ufffd.txt: not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CascadeError, match=rf"{name}: cannot be read: a pipe or a device, not a file; pipe it to `-`"):
        read_prompts(str(tmp_path / name), 0)
    (tmp_path / "captions").mkdir()
    os.mkfifo(tmp_path / "captions" / "a.txt")
    (failure,) = read_prompts(str(tmp_path / "captions"), 0)
    assert str(failure).endswith("a.txt: cannot be read: a pipe or a device, not a file")


TABLE = [["prompt", "seed"], ["a fox, red; and old", "7"], ["a star", "1.0"]]


@pytest.mark.parametrize(("name", "separator"), [("p.csv", ","), ("p.csv", ";"), ("p.csv", "\t"), ("p.tsv", "\t")])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_are_read_with_the_separator_that_their_header_has(
    tmp_path: Path, name: str, separator: str, packed: bool
) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator).writerows(TABLE)
    content = buffer.getvalue().encode()
    name, content = (f"{name}.gz", gzip.compress(content)) if packed else (name, content)
    found = good(read(tmp_path, name, content))
    assert [(record.prompt, record.seed) for record in found] == [("a fox, red; and old", 7), ("a star", 1)]
    assert count_prompts(str(tmp_path / name)) == 2


def test_a_tsv_of_one_column_may_hold_commas(tmp_path: Path) -> None:
    assert [record.prompt for record in good(read(tmp_path, "p.tsv", "prompt\na fox, red\n"))] == ["a fox, red"]


@pytest.mark.parametrize(
    ("cell", "seed"), [("7.0", 7), ("7.", 7), (" 7.000 ", 7), ("7.5", None), (".0", None), ("1e3", None)]
)
def test_a_whole_number_may_be_written_as_a_spreadsheet_does(tmp_path: Path, cell: str, seed: int | None) -> None:
    (record,) = read(tmp_path, "p.csv", f"prompt,seed\na fox,{cell}\n")
    assert getattr(record, "seed", None) == seed


@pytest.mark.parametrize("name", ["p.txt.gz", "p.ndjson", "p.jsonl.gz", "P.TXT"])
def test_files_may_be_packed_and_called_otherwise(tmp_path: Path, name: str) -> None:
    lines = b'"a fox"\n"a star"\n' if "json" in name else b"a fox\na star\n"
    found = good(read(tmp_path, name, gzip.compress(lines) if name.endswith(".gz") else lines))
    assert [record.prompt for record in found] == ["a fox", "a star"]


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"a fox\n" * 9999, mtime=0)[:60], b""], ids=["not packed", "cut", "empty"]
)
def test_a_damaged_packed_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.txt.gz").write_bytes(content)
    with pytest.raises(CascadeError, match=r"p\.txt\.gz: (cannot be read|no prompts in it)"):
        list(read_prompts(str(tmp_path / "p.txt.gz"), 0))


def test_a_folder_of_parquet_parts_is_one_list_of_prompts(tmp_path: Path) -> None:
    for name, prompts in {"part-1": ["c"], "part-0": ["a", ""]}.items():
        parquet.write_table(pa.table({"prompt": prompts}), tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "._part-0.parquet").write_bytes(b"no table")
    records = list(read_prompts(str(tmp_path), 0))
    assert [record.prompt for record in good(records)] == ["a", "c"]
    assert str(records[1]) == f"{tmp_path}/part-0.parquet:2: prompt is missing"
    assert count_prompts(str(tmp_path)) == 3


def test_hidden_files_are_no_captions_and_endings_may_be_written_large(tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", ".b.txt", "B.TXT", "c.caption", "d.Caption", "e.md"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" if name.startswith(".") else b"a fox")
    assert [record.id for record in good(read_prompts(str(tmp_path), 0))] == ["B", "a", "c", "d"]
    assert count_prompts(str(tmp_path)) == 4


@pytest.mark.parametrize(
    ("content", "message"), [(b"no table", "damaged, or not Parquet"), (None, "'promt' is not a column")]
)
def test_a_wrong_parquet_file_is_refused_at_once(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.parquet"
    if content is None:
        parquet.write_table(pa.table({"promt": ["a"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CascadeError, match=message):
        read_prompts(str(path), 0)


def test_a_stage_of_any_name_leaves_a_message_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(r'{"prompt": "a", "steps": {"\n": null}}')
    (failure,) = read_prompts(str(tmp_path / "p.jsonl"), 0)
    assert str(failure).endswith(r"p.jsonl:1: steps.\n: expected a whole number in 1..1000000, found null")


def check_any_lines(folder: Path, name: str, lines: list[bytes]) -> None:
    """Whatever stands in a file: it is refused at once, or each line is a record or a failure that names it."""
    path = folder / name
    path.write_bytes(b"\n".join(lines))
    records: list[PromptRecord | Failure] = []
    with suppress(CascadeError):
        records = list(read_prompts(str(path), 0))
    assert [record.index for record in records] == list(range(len(records)))
    for record in records:
        assert record.origin.startswith(f"{path}:")
        if isinstance(record, PromptRecord):
            record.prompt.encode()
            assert record.prompt.strip()
        else:
            assert "\n" not in str(record)
            str(record).encode()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_COLUMNS = st.sampled_from(["prompt", "seed", "id", "steps", "guidance", "num_images", "negative_prompt", "sed"])
_LINE = (
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    | st.dictionaries(_COLUMNS, _VALUES, max_size=5).map(lambda value: json.dumps(value).encode())
)
_NAMES = st.sampled_from(["p.txt", "p.jsonl", "p.csv"])
_FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=100, **_FUZZ)  # type: ignore[arg-type]
@given(name=_NAMES, lines=st.lists(_LINE, max_size=5), header=st.booleans())
def test_any_lines_are_read_or_named(tmp_path: Path, name: str, lines: list[bytes], header: bool) -> None:
    check_any_lines(tmp_path, name, [b"prompt,seed,id"] * header + lines)


@pytest.mark.slow
@settings(max_examples=2_000, **_FUZZ)  # type: ignore[arg-type]
@given(name=_NAMES, lines=st.lists(_LINE, min_size=5, max_size=8), header=st.booleans())
def test_ten_thousand_lines_of_anything_are_read_or_named(
    tmp_path: Path, name: str, lines: list[bytes], header: bool
) -> None:
    check_any_lines(tmp_path, name, [b"prompt,seed,id"] * header + lines)


def test_memory_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 8_000):
        (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "fox {n}", "id": "{n}"}}\n' for n in range(count)))
        tracemalloc.start()
        assert not any(isinstance(record, Failure) for record in read_prompts(str(tmp_path / "p.jsonl"), 0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_the_names_of_captions_are_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 names, a list would take 8 MB."""
    names = (SimpleNamespace(name=f"a caption {number}.txt") for number in range(100_000))
    monkeypatch.setattr("os.scandir", lambda _folder: nullcontext(names))
    tracemalloc.start()
    first = next(rows_of(str(tmp_path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first[0] == "/a caption 0.txt"
    assert peak < 1_000_000


def test_a_full_disk_for_temporary_tables_is_reported(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"a fox in picture {number}\n" for number in range(80_000)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(CascadeError, match=r"a temporary table cannot be written: .* SQLITE_TMPDIR"):
            list(read_prompts(str(tmp_path / "p.txt"), 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
