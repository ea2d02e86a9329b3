"""Records from every kind of source, and the order of their uses."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tiny_data import encoded, plain_picture, write_folder, write_parquet, write_tar

from cascade.config.data import FolderSource, HubSource, ParquetSource, ScenesSource, SourceConfig, WebDatasetSource
from cascade.data.records import ALL, BadRecordError, Record, caption_variants, encoded_picture
from cascade.data.sources import SceneSource, ShuffledSource, StreamSource, open_records, open_source
from cascade.data.tables import _stream_records
from cascade.data.transforms import decode
from cascade.errors import CascadeError


def listing(source: FolderSource | ParquetSource | HubSource | WebDatasetSource) -> dict[str, tuple[str, ...]]:
    records = open_records(source)
    return {records[index].origin: records[index].captions for index in range(len(records))}


# --- folders ---------------------------------------------------------------------------------------------


def test_a_folder_is_searched_recursively_and_sorted(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", 2)
    write_folder(tmp_path / "a" / "deep", 1)
    found = listing(FolderSource(path=str(tmp_path)))
    assert list(found) == [str(tmp_path / name) for name in ("a/deep/000.png", "b/000.png", "b/001.png")]


def test_each_line_of_a_sidecar_is_a_variant(tmp_path: Path) -> None:
    write_folder(tmp_path, 1)
    (tmp_path / "000.txt").write_text(" a fox \n\na red fox\r\n", encoding="utf-8-sig")
    assert listing(FolderSource(path=str(tmp_path))) == {str(tmp_path / "000.png"): ("a fox", "a red fox")}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_names_captions_and_goes_before_sidecars(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, 3, silent=(1,))
    rows = {
        "metadata.jsonl": '{"file_name": "000.png", "text": ["a fox", "fox"]}\n\n'
        '{"file_name": "gone.png", "text": "x"}',
        "metadata.csv": 'file_name,text,more\n000.png,"a fox, red",1\ngone.png,x,2\n',
    }
    (tmp_path / name).write_text(rows[name])
    found = listing(FolderSource(path=str(tmp_path), caption_column="text"))
    assert found == {
        str(tmp_path / "000.png"): ("a fox", "fox") if name.endswith("jsonl") else ("a fox, red",),
        str(tmp_path / "001.png"): (),
        str(tmp_path / "002.png"): ("picture 2",),
        str(tmp_path / "gone.png"): ("x",),
    }


def test_captions_of_one_picture_in_several_lines_and_lists_are_variants(tmp_path: Path) -> None:
    write_folder(tmp_path / "sub", 1)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "sub/000.png", "caption": "one"}\n{"file_name": "./sub/../sub/000.png", "caption": "two"}\n'
    )
    (tmp_path / "metadata.csv").write_text("file_name,caption\nsub/000.png,three\nsub/000.png,one\n")
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "000.png", "caption": ["four", "five"]}')
    (captions,) = listing(FolderSource(path=str(tmp_path))).values()
    assert captions == ("one", "two", "four", "five", "three")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "prompt": "x"}',
            "no column 'caption'; the columns are file_name, prompt",
        ),
        ("metadata.csv", "file,caption\na.png,x\n", "no column 'file_name'; the columns are caption, file"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{oops', "metadata.jsonl, line 2: not valid JSON"),
        (
            "metadata.csv",
            f"file_name,caption\na.png,{'x' * 200_000}\n",
            "line 2: not valid CSV: field larger",
        ),
        ("metadata.jsonl", "[1]", "metadata.jsonl, line 1: expected an object"),
        ("metadata.csv", "file_name,caption\na.png,a fox, red\n", "line 2: 3 cells, but the header has 2"),
        ("metadata.csv", 'file_name,caption\na.png,"a fox with a 12" hat"\n', "line 2: not valid CSV: ',' expected"),
        ("metadata.csv", 'file_name,caption\na.png,"a fox\nb.png,two\nc.png,three\n', "metadata.csv:2: the quote"),
        ("metadata.csv", "file_name,caption\na.png,a\0fox\n", "metadata.csv: holds zero bytes"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CascadeError, match=message):
        open_records(FolderSource(path=str(tmp_path)))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_captions_are_read_in_any_unicode_and_with_any_line_end(tmp_path: Path, encoding: str, end: str) -> None:
    write_folder(tmp_path, 2, silent=(0, 1))
    (tmp_path / "000.txt").write_bytes(f"a fox{end}a réd fox{end}".encode(encoding))
    (tmp_path / "metadata.csv").write_bytes(f"file_name,caption{end}001.png,a stár{end}".encode(encoding))
    assert list(listing(FolderSource(path=str(tmp_path))).values()) == [("a fox", "a réd fox"), ("a stár",)]


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("metadata.csv", 'file_name,caption\r\na.png,"red\napple"\r\n', "red\napple"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "red\u2028apple"}\r\n', "red\u2028apple"),
    ],
)
def test_line_ends_inside_a_caption_are_part_of_it(tmp_path: Path, name: str, text: str, caption: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert listing(FolderSource(path=str(tmp_path))) == {str(tmp_path / "a.png"): (caption,)}


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="gone: no such folder"):
        open_records(FolderSource(path=str(tmp_path / "gone")))
    with pytest.raises(CascadeError, match="no pictures; looked for"):
        open_records(FolderSource(path=str(tmp_path)))


def test_captions_are_whatever_text_there_is() -> None:
    assert caption_variants(" a ") == ("a",)
    assert caption_variants(["a", "", None, " b"]) == ("a", "b")
    assert caption_variants(None) == caption_variants("  ") == caption_variants(3) == ()


# --- Parquet and datasets --------------------------------------------------------------------------------


def test_parquet_rows_are_records_named_by_file_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "one.parquet", 0, 2)
    write_parquet(tmp_path / "two.parquet", 2, 2)
    source = ParquetSource(files=(str(tmp_path / "*.parquet"),), caption_column="captions")
    records = open_records(source)
    assert len(records) == 4
    assert records[3] == Record(encoded(plain_picture(3)), ("picture 3", "number 3"), f"{tmp_path}/two.parquet, row 1")
    assert [variants[0] for variants in records.captions()] == [f"picture {number}" for number in range(4)]


def test_plain_bytes_in_parquet_are_pictures_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"png": [encoded(plain_picture(5))], "text": ["five"]}), tmp_path / "raw.parquet")
    source = ParquetSource(files=(str(tmp_path / "raw.parquet"),), image_column="png", caption_column="text")
    assert open_records(source)[0].image == encoded(plain_picture(5))


@pytest.mark.parametrize("name", ["a[1]", "[t", "b*", "c?", "{d}", "e,f", "g#h", "m'n\"", "__k__", ".l"])
def test_a_name_is_no_pattern_where_a_name_is_meant(tmp_path: Path, name: str) -> None:
    """Beside it stand folders that the name as a pattern would match."""
    write_parquet(tmp_path / name / "data.parquet", 7, 1)
    for number, other in enumerate(("a1", "t", "bb", "cc")):
        write_parquet(tmp_path / other / "data.parquet", number, 1)
    write_tar(tmp_path / name / "0.tar", 7, 1)
    write_folder(tmp_path / name, 1)
    sources: list[FolderSource | ParquetSource | HubSource | WebDatasetSource] = [
        ParquetSource(files=(f"{tmp_path}/{name}/data.parquet",)),
        ParquetSource(files=(f"{tmp_path}/{name}/*.parquet",)),
        WebDatasetSource(files=(f"{tmp_path}/{name}/?.tar",)),
        FolderSource(path=f"{tmp_path}/{name}"),
    ]
    for source, caption in zip(sources, ("picture 7", "picture 7", "picture 7", "picture 0"), strict=True):
        assert [captions[0] for captions in listing(source).values()] == [caption]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "x::y"])
def test_a_data_set_in_a_folder_that_the_library_takes_for_a_pattern_is_refused(
    tmp_path: Path, name: str, streaming: bool
) -> None:
    """It would read nothing, or what lies in `bb`."""
    write_parquet(tmp_path / name / "train.parquet", 7, 1)
    write_parquet(tmp_path / "bb" / "train.parquet", 0, 1)
    with pytest.raises(CascadeError, match=r"as a pattern; rename the folder, or read it with kind: parquet"):
        open_source(HubSource(name=f"{tmp_path}/{name}", streaming=streaming), 8, (0,))


def test_brackets_that_match_nothing_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"no file matches; brackets match any letter inside them: write \[\[\]"):
        open_records(ParquetSource(files=(f"{tmp_path}/a[1]/*.parquet",)))


def test_a_missing_column_is_answered_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "one.parquet", 0, 1)
    with pytest.raises(CascadeError, match=r"one.parquet: no column 'text'; the columns are image, caption, captions"):
        open_records(ParquetSource(files=(str(path),), caption_column="text"))
    for streaming in (False, True):
        source = HubSource(name=str(tmp_path), image_column="picture", streaming=streaming)
        with pytest.raises(CascadeError, match="no column 'picture'; the columns are image, caption, captions"):
            open_source(source, 8, (0,)).record(0)


def test_files_that_are_not_there_or_not_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    for pattern, message in {
        "*.none": "no file matches",
        "": "it is a folder: use folder/",
        "bad.parquet": "bad.parquet: not a readable Parquet file",
    }.items():
        with pytest.raises(CascadeError, match=message):
            open_records(ParquetSource(files=(str(tmp_path / pattern),)))


def test_files_whose_columns_differ_are_named_with_the_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = encoded(plain_picture(0))
    for name, caption in {"a": "a fox", "b": ["a fox", "a red fox"]}.items():
        pq.write_table(pa.table({"image": [picture], "caption": [caption]}), tmp_path / f"{name}.parquet")
    with pytest.raises(CascadeError, match=r"b\.parquet: column 'caption' is list<.*>, in .*a\.parquet string;"):
        open_records(ParquetSource(files=(f"{tmp_path}/*.parquet",)))


def test_a_cache_that_may_not_be_written_is_told_with_the_way_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", "/home/somebody")

    path = write_parquet(tmp_path / "a.parquet", 0, 1)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        CascadeError, match=r"Permission denied.*; its cache is .*: HF_DATASETS_CACHE names another folder"
    ):
        open_records(ParquetSource(files=(str(path),)))


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "empty.parquet", 0, 0)
    with pytest.raises(CascadeError, match="no rows"):
        open_records(ParquetSource(files=(str(path),)))


def test_an_unknown_dataset_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="nothing-here: cannot be loaded") as raised:
        open_records(HubSource(name=str(tmp_path / "nothing-here")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_gives_the_same_records_as_its_parquet_files(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "train.parquet", 0, 5)
    source = open_source(HubSource(name=str(tmp_path), streaming=streaming, shuffle_buffer=2), 8, (0,))
    found = sorted((source.record(use) for use in range(5)), key=lambda record: record.origin)
    assert found == [
        Record(encoded(plain_picture(number)), (f"picture {number}",), f"{tmp_path}, row {number}")
        for number in range(5)
    ]


def test_what_datasets_give_for_a_picture_is_taken_and_the_rest_is_none() -> None:
    image = Image.new("RGB", (1, 1))
    assert encoded_picture({"bytes": b"x", "path": "a.png"}) == b"x"
    assert encoded_picture({"bytes": None, "path": "a.png"}) == Path("a.png")
    assert encoded_picture(image) is image
    assert encoded_picture({"bytes": None, "path": None}) is encoded_picture("text") is encoded_picture(None) is None


# --- orders ----------------------------------------------------------------------------------------------


class Numbers:
    """Records 0, 1, ... without pictures."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return Record(None, (), str(index))

    def captions(self) -> Iterator[tuple[str, ...]]:
        return iter([()] * self.count)


class CountedStream:
    """A stream of numbered records that knows how often it was opened, and how many records were read."""

    def __init__(self, count: int) -> None:
        self.records = Numbers(count)
        self.skips: list[int] = []
        self.read = 0

    def __call__(self, skip: int) -> Iterator[Record]:
        self.skips.append(skip)
        for index in range(skip, len(self.records)):
            self.read += 1
            yield self.records[index]


def used(source: ShuffledSource | StreamSource, uses: range) -> list[int]:
    return [int(source.record(use).origin) for use in uses]


def test_every_epoch_uses_each_record_once_in_an_order_of_its_own() -> None:
    source = ShuffledSource(Numbers(20), (0,))
    epochs = [used(source, range(20 * epoch, 20 * epoch + 20)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_give_different_orders() -> None:
    assert used(ShuffledSource(Numbers(20), (0,)), range(20)) != used(ShuffledSource(Numbers(20), (1,)), range(20))


@pytest.mark.parametrize("count", [20, 23])
def test_a_stream_is_permuted_within_blocks_anew_in_each_epoch(count: int) -> None:
    source = StreamSource(CountedStream(count), 5, "numbers", (0,))
    epochs = [used(source, range(count * epoch, count * (epoch + 1))) for epoch in range(3)]
    for epoch in epochs:
        blocks = [epoch[start : start + 5] for start in range(0, count, 5)]
        assert [sorted(block) for block in blocks] == [
            list(range(start, min(start + 5, count))) for start in range(0, count, 5)
        ]
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("count", [20, 23])
@pytest.mark.parametrize("start", [0, 3, 5, 19, 20, 24, 40, 69, 111])
def test_a_stream_resumes_exactly_from_any_use(count: int, start: int) -> None:
    whole = used(StreamSource(CountedStream(count), 5, "numbers", (0,)), range(140))
    assert used(StreamSource(CountedStream(count), 5, "numbers", (0,)), range(start, 140)) == whole[start:]


def test_a_stream_resumes_by_skipping_and_is_read_once_per_epoch() -> None:
    stream = CountedStream(20)
    used(StreamSource(stream, 5, "numbers", (0,)), range(12, 20))
    assert (stream.skips, stream.read) == ([10], 10)
    # A worker that needs every sixth record still reads on instead of starting again.
    stream = CountedStream(100)
    used(StreamSource(stream, 5, "numbers", (0,)), range(0, 100, 6))
    assert (stream.skips, stream.read) == ([0], 100)


def test_a_stream_without_records_is_named() -> None:
    with pytest.raises(CascadeError, match="numbers: the stream has no records"):
        StreamSource(CountedStream(0), 5, "numbers", (0,)).record(0)


def test_a_stream_that_got_shorter_is_named() -> None:
    stream = CountedStream(10)
    source = StreamSource(stream, 5, "numbers", (0,))
    used(source, range(11))
    stream.records = Numbers(7)
    with pytest.raises(CascadeError, match="ended earlier than in its first epoch"):
        used(source, range(10, 30))


def test_another_attempt_is_another_record_of_the_same_source() -> None:
    sources = [ShuffledSource(Numbers(50), (0,)), StreamSource(CountedStream(50), 50, "numbers", (0,))]
    for source in sources:
        tried = [source.record(3, attempt).origin for attempt in range(6)]
        assert len(set(tried)) > 3
        assert tried == [source.record(3, attempt).origin for attempt in range(6)]


def test_scenes_differ_from_use_to_use_but_not_from_run_to_run() -> None:
    records = [SceneSource(False, 16, (0,)).record(use) for use in range(20)]
    again = SceneSource(False, 16, (0,)).record(7)
    assert again.captions == records[7].captions
    assert len({record.captions for record in records}) > 10


def test_every_source_travels_to_another_process(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub" / "train.parquet", 0, 4)
    write_folder(tmp_path / "folder", 4)
    configs: list[SourceConfig] = [
        FolderSource(path=str(tmp_path / "folder")),
        ParquetSource(files=(str(tmp_path / "hub" / "*.parquet"),)),
        HubSource(name=str(tmp_path / "hub")),
        HubSource(name=str(tmp_path / "hub"), streaming=True),
        ScenesSource(),
    ]
    for config in configs:
        source = open_source(config, 8, (0,))
        source.record(0)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.record(5).captions == source.record(5).captions


def test_captions_are_read_as_utf8(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "001.png", "caption": "é"}), encoding="utf-8")
    assert listing(FolderSource(path=str(tmp_path)))[str(tmp_path / "001.png")] == ("é",)


def test_a_sidecar_that_is_not_utf8_is_named_and_other_captions_are_still_found(tmp_path: Path) -> None:
    write_folder(tmp_path, 2, silent=(0,))
    (tmp_path / "000.txt").write_bytes("é".encode("latin-1"))
    records = open_records(FolderSource(path=str(tmp_path)))
    with pytest.raises(BadRecordError, match=r"000\.txt: not UTF-8"):
        records[0]
    assert list(records.captions()) == [("picture 1",)]


def test_an_uppercase_sidecar_is_found_and_a_folder_is_no_picture(tmp_path: Path) -> None:
    write_folder(tmp_path, 1, silent=(0,))
    (tmp_path / "000.TXT").write_text("a fox")
    (tmp_path / "folder.png").mkdir()
    assert listing(FolderSource(path=str(tmp_path))) == {str(tmp_path / "000.png"): ("a fox",)}


def test_a_folder_is_read_as_people_and_their_programs_leave_it(tmp_path: Path) -> None:
    """kohya's captions, a JupyterLab copy, what a Mac adds, a linked folder, newer formats."""
    data = write_folder(tmp_path / "data", 1, silent=(0,))
    (data / "000.caption").write_text("a fox")
    (data / "000.txt").write_text("a red fox\na fox")
    write_folder(tmp_path / "far", 1)
    (data / "linked").symlink_to(tmp_path / "far")
    for name in ("._000.png", ".ipynb_checkpoints/000-checkpoint.png"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(b"no picture")
    for ending, format in {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000"}.items():
        plain_picture(9, 32).save(data / f"1.{ending}", format)
    found = listing(FolderSource(path=str(data)))
    assert [Path(origin).relative_to(data).as_posix() for origin in found] == [
        "000.png",
        "1.avif",
        "1.jfif",
        "1.jp2",
        "linked/000.png",
    ]
    assert [found[str(data / name)] for name in ("000.png", "linked/000.png")] == [
        ("a red fox", "a fox"),
        ("picture 0",),
    ]
    records = open_records(FolderSource(path=str(data)))
    assert [decode(records[index]).shape for index in (1, 2, 3)] == [(3, 32, 32)] * 3


def test_unreadable_files_in_a_folder_are_counted_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, 1)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    open_records(FolderSource(path=str(tmp_path)))
    assert f"data source {tmp_path}: 2 files left out, the first: {tmp_path}/gone: cannot be read" in caplog.text


def test_a_pipe_beside_a_picture_or_in_the_place_of_a_list_is_not_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path, 1, silent=(0,))
    os.mkfifo(tmp_path / "000.txt")
    with pytest.raises(BadRecordError, match=r"000\.txt: cannot be read: a pipe or a device, not a file"):
        open_records(FolderSource(path=str(tmp_path)))[0]
    os.mkfifo(tmp_path / "metadata.csv")
    assert len(open_records(FolderSource(path=str(tmp_path)))) == 1


def test_a_long_name_has_no_longer_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / f"{'x' * 250}.png").write_bytes(encoded(plain_picture(0)))
    assert list(listing(FolderSource(path=str(tmp_path))).values()) == [()]


class BrokenStream:
    """A stream of the library that breaks off after two rows."""

    def skip(self, _count: int) -> "BrokenStream":
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, list[object]]]:  # noqa: ARG002 - the library's
        yield {"image": [None, None], "caption": ["a", "b"]}
        raise OSError("connection\nreset")


def test_a_stream_that_breaks_off_is_one_clear_line() -> None:
    stream = _stream_records(BrokenStream(), HubSource(name="far/away"), ALL, 0)
    assert [next(stream).captions for _ in range(2)] == [("a",), ("b",)]
    with pytest.raises(CascadeError, match=r"^data source far/away: the stream broke off: connection$"):
        next(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_rows_is_named(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "train.parquet", 0, 0)
    with pytest.raises(CascadeError, match=r"no rows|no records|cannot be loaded"):
        open_source(HubSource(name=str(tmp_path), streaming=streaming), 8, (0,)).record(0)
