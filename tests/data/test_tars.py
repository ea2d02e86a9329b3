"""WebDataset shards: every record is read in place, used once per epoch, and in the same order after a stop."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_data import encoded, plain_picture, write_tar

from cascade.config.data import DataConfig, HubSource, SourceConfig, WebDatasetSource
from cascade.config.stage import StageConfig
from cascade.data.loader import Portion, batches, captions_of
from cascade.data.records import BadRecordError, Record
from cascade.data.sources import ShardedSource, open_records, open_source
from cascade.data.tars import INDEX_FOLDER, TarRecords
from cascade.errors import CascadeError
from cascade.files import containers as tars
from cascade.files.tensors import save_tensors

SHARDS = (5, 1, 7, 3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of 5, 1, 7 and 3 records, numbered on."""
    for number, (first, count) in enumerate(zip(itertools.accumulate(SHARDS, initial=0), SHARDS, strict=False)):
        write_tar(tmp_path / f"{number}.tar", first, count)
    return tmp_path


def source_of(folder: Path, **options: object) -> WebDatasetSource:
    return WebDatasetSource(files=(f"{folder}/*.tar",), **options)


def numbers(source: ShardedSource, uses: range) -> list[int]:
    return [int(source.record(use).captions[0].split()[1]) for use in uses]


def test_records_are_read_where_they_lie(shards: Path) -> None:
    records = open_records(source_of(shards))
    assert len(records) == sum(SHARDS)
    for number in (0, 5, 6, 15):
        record = records[number]
        assert record.image == encoded(plain_picture(number))
        assert record.captions == (f"picture {number}", f"number {number}")
        assert record.origin.endswith(f".tar: {number:04}")
    assert [variants[1] for variants in records.captions()] == [f"number {number}" for number in range(16)]


def test_captions_in_json_members_have_a_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", 3, 1, json_captions=True)
    assert open_records(source_of(tmp_path, caption="json", caption_column="text"))[0].captions[1] == "number 3"


def test_an_ending_or_key_that_no_caption_has_is_answered_with_those_there_are(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"0\.tar: no member ends in \.caption, only in cls, png, txt; set"):
        open_records(source_of(shards, caption="caption"))
    write_tar(tmp_path / "json" / "0.tar", 0, 0)
    write_tar(tmp_path / "json" / "1.tar", 3, 2, json_captions=True)
    with pytest.raises(CascadeError, match=r"1\.tar: no member ends in \.txt, only in cls, json, png; set"):
        open_records(source_of(tmp_path / "json"))
    with pytest.raises(CascadeError, match=r"1\.tar: no key 'caption' in its \.json members; the keys are text"):
        open_records(source_of(tmp_path / "json", caption="json"))


def test_a_record_without_picture_or_with_unreadable_caption_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("only words")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "folder/a.txt")
        tar.add(tmp_path / "b.txt", "folder/b.txt")
    records = open_records(source_of(tmp_path))
    with pytest.raises(BadRecordError, match=r"0\.tar: folder/a: its caption is not readable"):
        records[0]
    assert records[1] == Record(None, ("only words",), f"{tmp_path}/0.tar: folder/b")
    assert list(records.captions()) == [("only words",)]


def members(path: Path, *named: tuple[str, bytes]) -> None:
    """A tar of members with these names and contents, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in named:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_several_captions_of_one_key_are_variants(tmp_path: Path) -> None:
    fox = encoded(plain_picture(1))
    members(tmp_path / "0.tar", ("a.png", fox), ("a.txt", b"a fox"), ("a.txt", b"a red fox\na fox"), ("b.png", fox))
    records = open_records(source_of(tmp_path))
    assert [records[index].captions for index in range(2)] == [("a fox", "a red fox"), ()]
    assert list(records.captions()) == [("a fox", "a red fox"), ()]


def test_a_key_with_two_pictures_is_two_records_and_loses_neither(tmp_path: Path) -> None:
    one, two = (encoded(plain_picture(number)) for number in (1, 2))
    members(tmp_path / "0.tar", ("a.txt", b"one"), ("a.png", one), ("a.txt", b"two"), ("a.png", two))
    members(tmp_path / "1.tar", ("a.png", one), ("a.png", two), ("a.txt", b"a fox"))
    records = open_records(source_of(tmp_path))
    found = [(records[index].image, records[index].captions) for index in range(len(records))]
    assert found == [(one, ("one",)), (two, ("two",)), (one, ("a fox",)), (two, ("a fox",))]


def test_members_that_a_mac_leaves_between_split_no_record(tmp_path: Path) -> None:
    fox = encoded(plain_picture(1))
    names = ("./._a.png", "./a.png", "./._a.txt", "./a.txt", ".ipynb_checkpoints/b.png", "__MACOSX/._a.png")
    members(tmp_path / "0.tar", *((name, b"a fox" if name == "./a.txt" else fox) for name in names))
    records = open_records(source_of(tmp_path))
    assert [records[index].captions for index in range(len(records))] == [("a fox",)]
    with pytest.raises(CascadeError, match=r"no member ends in \.cap, only in png, txt; set"):
        open_records(source_of(tmp_path, caption="cap"))


def test_an_index_of_another_layout_is_made_anew(shards: Path) -> None:
    path = shards / "0.tar"
    stat = path.stat()
    stamp = torch.tensor([3, stat.st_size, stat.st_mtime_ns])
    save_tensors(shards / INDEX_FOLDER / "0.tar.txt.safetensors", {"stamp": stamp, "places": torch.zeros(5, 4)})
    assert open_records(source_of(shards))[4].captions[0] == "picture 4"


def test_headers_are_walked_once_and_again_when_the_file_changed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def walked(path: Path) -> Iterator[tarfile.TarInfo]:
        opened.append(path.name)
        return tars.members(path)

    monkeypatch.setattr("cascade.data.tars.members", walked)
    open_records(source_of(shards))
    open_records(source_of(shards))
    assert opened == [f"{number}.tar" for number in range(4)]
    monkeypatch.undo()
    write_tar(shards / "1.tar", 70, 2)
    (shards / INDEX_FOLDER / "0.tar.txt.safetensors").write_bytes(b"torn")
    records = open_records(source_of(shards))
    assert [records[index].captions[0] for index in (0, 5, 6, 7)] == [
        "picture 0",
        "picture 70",
        "picture 71",
        "picture 6",
    ]


def test_shards_in_a_folder_that_cannot_be_written_are_read_all_the_same(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shards / INDEX_FOLDER).write_text("a file where the folder should be")
    with caplog.at_level("INFO"):
        assert len(open_records(source_of(shards))) == sum(SHARDS)
    assert "will read the shard's headers again" in caplog.text


@pytest.mark.parametrize("keep", [0.4, 0.9, 1.0])
def test_a_shard_that_is_cut_or_compressed_is_named(shards: Path, keep: float) -> None:
    whole = (shards / "2.tar").read_bytes()
    used = max(index for index, byte in enumerate(whole) if byte)
    (shards / "2.tar").write_bytes(whole[: int(used * keep)])
    with pytest.raises(CascadeError, match=r"2\.tar: not a complete, uncompressed tar file"):
        open_records(source_of(shards))
    with tarfile.open(shards / "2.tar", "w:gz") as tar:
        tar.add(shards / "0.tar")
    with pytest.raises(CascadeError, match=r"2\.tar: not a complete, uncompressed tar file.*unpack \.tar\.gz"):
        open_records(source_of(shards))


def test_shards_without_records_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", 0, 0)
    with pytest.raises(CascadeError, match="the shards hold no records"):
        open_records(source_of(tmp_path))


@pytest.mark.parametrize("block", [1, 4, 100])
def test_every_epoch_uses_each_record_once_in_an_order_of_its_own(shards: Path, block: int) -> None:
    source = open_source(source_of(shards, shuffle_block=block), 8, (0,))
    assert isinstance(source, ShardedSource)
    epochs = [numbers(source, range(16 * epoch, 16 * epoch + 16)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_block_of_one_keeps_shards_together_and_in_order(shards: Path) -> None:
    order = numbers(open_source(source_of(shards, shuffle_block=1), 8, (0,)), range(16))
    ends = itertools.accumulate(SHARDS)
    whole = [list(range(end - count, end)) for end, count in zip(ends, SHARDS, strict=True)]
    sequences = [list(itertools.chain(*shards)) for shards in itertools.permutations(whole)]
    assert order in sequences
    assert order != sorted(order)


@pytest.mark.parametrize("start", [1, 4, 15, 16, 37])
def test_an_order_goes_on_from_any_use(shards: Path, start: int) -> None:
    config = source_of(shards, shuffle_block=4)
    whole = numbers(open_source(config, 8, (0,)), range(60))
    assert numbers(open_source(config, 8, (0,)), range(start, 60)) == whole[start:]


def test_another_attempt_is_another_record(shards: Path) -> None:
    source = open_source(source_of(shards), 8, (0,))
    tried = [source.record(3, attempt).origin for attempt in range(6)]
    assert len(set(tried)) > 2
    assert tried == [source.record(3, attempt).origin for attempt in range(6)]


def test_sharded_order_is_arithmetic_on_whichever_records(tmp_path: Path) -> None:
    """The n-th record of the sequence is in the right shard, whatever their sizes, an empty one among them."""
    write_tar(tmp_path / "0.tar", 0, 2)
    write_tar(tmp_path / "1.tar", 0, 0)
    write_tar(tmp_path / "2.tar", 2, 2)
    records = TarRecords([str(tmp_path / f"{number}.tar") for number in range(3)], "txt", "caption")
    source = ShardedSource(records, records.starts, 2, (1,))
    for epoch in range(6):
        assert sorted(numbers(source, range(4 * epoch, 4 * epoch + 4))) == [0, 1, 2, 3]


def sources(shards: Path) -> list[SourceConfig]:
    return [
        source_of(shards, shuffle_block=4),
        HubSource(name=str(shards), streaming=True, image_column="png", caption_column="txt", shuffle_buffer=4),
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["in place", "as a stream of datasets"])
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2), (4, 1)])
def test_processes_and_workers_share_the_records_without_overlap_or_loss(
    shards: Path, stage: StageConfig, kind: int, processes: int, workers: int
) -> None:
    """Counted over two epochs by the pictures themselves; resumed in the middle by another number of processes."""
    data = DataConfig(sources=(sources(shards)[kind],), caption_dropout=0.0)
    seen: list[tuple[int, int]] = []
    for first, share in ((0, processes), (3, 1)):
        for process in range(share):
            stream = batches(
                data.model_copy(update={"workers": workers if share > 1 else 0}),
                stage,
                0,
                batch_size=4,
                portion=Portion(process, share, first),
            )
            for batch in itertools.islice(stream, 3 if first == 0 else 5):
                seen += zip(batch.samples, batch.images[:, 0, 0, 0].tolist(), strict=True)
            stream.close()
    assert sorted(sample for sample, _ in seen) == list(range(32))
    assert Counter(number for _, number in seen) == Counter(dict.fromkeys(range(16), 2))
    first_epoch = [number for sample, number in seen if sample < 16]
    assert sorted(first_epoch) == list(range(16))


def test_captions_of_shards_are_encoded_beforehand(shards: Path) -> None:
    assert len(set(captions_of([source_of(shards)]))) == 32
