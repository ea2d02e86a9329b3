"""View n is a function of (settings, seed, n): everything else follows."""

import itertools
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from tiny_data import encoded, plain_picture, write_folder, write_parquet
from torch.utils.data import Dataset

from cascade.config.data import DataConfig, FolderSource, HubSource, ParquetSource, ScenesSource
from cascade.config.stage import StageConfig
from cascade.config.training import TrainConfig
from cascade.data.loader import Batch, Mixture, Portion, Views, batches, captions_of
from cascade.data.workers import read_by_workers
from cascade.errors import CascadeError
from cascade.pictures.images import from_pil


def take(
    data: DataConfig,
    stage: StageConfig,
    count: int,
    *,
    batch_size: int = 4,
    first_batch: int = 0,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Batch]:
    data = data if workers is None else data.model_copy(update={"workers": workers})
    stream = batches(data, stage, 0, batch_size=batch_size, portion=Portion(*share, first_batch))
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.samples for batch in first] == [batch.samples for batch in second]
    assert [batch.captions for batch in first] == [batch.captions for batch in second]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


@pytest.fixture
def mixed(tmp_path: Path) -> DataConfig:
    """All kinds of sources at once, with every random transformation on."""
    write_folder(tmp_path / "folder", 7)
    write_parquet(tmp_path / "hub" / "train.parquet", 100, 9)
    hub = str(tmp_path / "hub")
    sources = (
        FolderSource(path=str(tmp_path / "folder")),
        ParquetSource(files=(f"{hub}/*.parquet",), caption_column="captions", weight=2.0),
        HubSource(name=hub, streaming=True, shuffle_buffer=4),
        ScenesSource(),
    )
    return DataConfig(sources=sources, caption_dropout=0.2, flip=0.5, jitter=0.1)


def test_a_view_depends_on_its_number_alone(mixed: DataConfig, stage: StageConfig) -> None:
    views, again = Views(mixed, stage, 0), Views(mixed, stage, 0)
    forwards = [views[number] for number in range(40)]
    for number in reversed(range(40)):
        view = again[number]
        assert torch.equal(view.image, forwards[number].image)
        assert (view.caption, view.sample) == (forwards[number].caption, number)


def test_seeds_give_different_views(mixed: DataConfig, stage: StageConfig) -> None:
    first, second = Views(mixed, stage, 0), Views(mixed, stage, 1)
    assert [first[number].caption for number in range(20)] != [second[number].caption for number in range(20)]


def test_caption_dropout_moves_no_picture(mixed: DataConfig, stage: StageConfig) -> None:
    dropped = Views(mixed.model_copy(update={"caption_dropout": 1.0}), stage, 0)
    kept = Views(mixed.model_copy(update={"caption_dropout": 0.0}), stage, 0)
    for number in range(10):
        assert torch.equal(dropped[number].image, kept[number].image)
        assert dropped[number].caption == ""
        assert kept[number].caption


def test_resuming_gives_the_batches_that_would_have_come(mixed: DataConfig, stage: StageConfig) -> None:
    assert_same(take(mixed, stage, 4, first_batch=6), take(mixed, stage, 10)[6:])


def test_shares_of_two_processes_make_the_batches_of_one(mixed: DataConfig, stage: StageConfig) -> None:
    whole = take(mixed, stage, 5)
    shares = [take(mixed, stage, 5, share=(process, 2)) for process in range(2)]
    joined = [
        Batch(torch.cat([a.images, b.images]), a.captions + b.captions, a.samples + b.samples)
        for a, b in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)
    assert len(shares[0][0]) == 2


def test_a_batch_that_processes_cannot_share_is_refused(mixed: DataConfig, stage: StageConfig) -> None:
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared equally by 3 processes"):
        take(mixed, stage, 1, share=(0, 3))


def test_workers_change_nothing_and_leave_when_the_iterator_closes(mixed: DataConfig, stage: StageConfig) -> None:
    assert_same(take(mixed, stage, 6, workers=2), take(mixed, stage, 6, workers=0))
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_the_same_one_line(tmp_path: Path, stage: StageConfig) -> None:
    write_folder(tmp_path, 3, silent=(0, 1, 2))
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),), max_bad_share=1.0, workers=1)
    with pytest.raises(CascadeError, match="50 records in a row are broken or have no caption") as raised:
        take(data, stage, 1)
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


def test_every_record_is_seen_once_per_epoch(tmp_path: Path, stage: StageConfig) -> None:
    write_folder(tmp_path, 12)
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),), caption_dropout=0.0)
    for epoch in range(3):
        captions = [caption for batch in take(data, stage, 3, first_batch=3 * epoch) for caption in batch.captions]
        assert sorted(captions) == sorted(f"picture {number}" for number in range(12))


def test_captions_stay_with_their_pictures(tmp_path: Path, stage: StageConfig) -> None:
    write_folder(tmp_path, 12)
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),), caption_dropout=0.0)
    for batch in take(data, stage, 3):
        assert batch.images.dtype == torch.uint8
        for image, caption in zip(batch.images, batch.captions, strict=True):
            assert torch.equal(image, from_pil(plain_picture(int(caption.split()[1]))))


def test_sources_are_used_by_weight_in_every_cycle_and_counted_without_gaps() -> None:
    mixture = Mixture([3.0, 1.0, 1e-9], seed=0)
    located = [mixture.locate(view) for view in range(3003)]
    for start in range(0, 3003, 1001):
        counts = Counter(source for source, _ in located[start : start + 1001])
        assert counts == {0: 750, 1: 250, 2: 1}
    for source in range(3):
        uses = [use for used, use in located if used == source]
        assert uses == list(range(len(uses)))
    assert [mixture.locate(view) for view in (2500, 3)] == [located[2500], located[3]]


def test_the_sources_are_mixed_not_blocked() -> None:
    mixture = Mixture([1.0, 1.0], seed=0)
    sources = [mixture.locate(view)[0] for view in range(1000)]
    # A fair coin changes sides 500 times in 1000 throws, give or take 16.
    assert 430 < sum(a != b for a, b in itertools.pairwise(sources)) < 570


def test_bad_records_are_replaced_and_named_once(
    tmp_path: Path, stage: StageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, 12, broken=(3,), silent=(5,))
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),), caption_dropout=0.0, max_bad_share=0.5)
    with caplog.at_level(logging.WARNING, logger="cascade.data"):
        taken = take(data, stage, 9)
    captions = {caption for batch in taken for caption in batch.captions}
    assert captions == {f"picture {number}" for number in range(12)} - {"picture 3", "picture 5"}
    assert len(caplog.messages) == 2
    assert any("003.png: broken picture" in message for message in caplog.messages)
    assert any("005.png: no caption" in message for message in caplog.messages)
    with_workers = take(data, stage, 9, workers=1)
    assert_same(with_workers, taken)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_records_stop_the_run_with_counts_and_names(
    tmp_path: Path, stage: StageConfig, workers: int
) -> None:
    write_folder(tmp_path, 30, broken=tuple(range(0, 30, 3)))
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),))
    with pytest.raises(
        CascadeError, match=r"\d+ of \d+ records are broken .* data.max_bad_share 0.05: .*\.png"
    ) as raised:
        take(data, stage, 50, workers=workers)
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


def test_a_few_bad_records_within_the_limit_do_not_stop_the_run(tmp_path: Path, stage: StageConfig) -> None:
    write_folder(tmp_path, 50, broken=(0, 1))
    data = DataConfig(sources=(FolderSource(path=str(tmp_path)),))
    assert len(take(data, stage, 50)) == 50


def test_captions_are_those_of_all_sources_that_end_without_their_pictures(
    mixed: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tmp_path / "folder").glob("*.png"):
        path.write_bytes(b"no picture")
    with caplog.at_level(logging.INFO, logger="cascade.data"):
        captions = list(captions_of(mixed.sources))
    variants = [f"{word} {number}" for number in range(100, 109) for word in ("picture", "number")]
    streamed = [f"picture {number}" for number in range(100, 109)]
    assert captions == [*(f"picture {number}" for number in range(7)), *variants, *streamed]
    assert [record.message for record in caplog.records] == [
        f"data source {tmp_path}/hub: reading the whole stream once, for its captions"
    ]


def test_tiles_need_a_crop_and_take_no_jitter() -> None:
    with pytest.raises(ValueError, match="tiles: true needs crop"):
        DataConfig(sources=(ScenesSource(),), tiles=True)
    with pytest.raises(ValueError, match="jitter resamples whole pictures"):
        DataConfig(sources=(ScenesSource(),), tiles=True, crop=64, jitter=0.1)


def test_smaller_pictures_of_their_own_travel_with_their_views_and_an_empty_cell_is_the_area_mean(
    tmp_path: Path,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [encoded(plain_picture(number)) for number in range(2)]
    lows = [encoded(plain_picture(100, size=4)), None]
    pq.write_table(pa.table({"image": pictures, "caption": ["with", "without"], "low": lows}), tmp_path / "a.parquet")
    source = ParquetSource(files=(str(tmp_path / "a.parquet"),), low_column="low")
    upscaler = StageConfig(name="upscaler", resolution=8, low_resolution=4)
    (batch,) = take(DataConfig(sources=(source,), caption_dropout=0.0), upscaler, 1, batch_size=6)
    assert {place for place, caption in enumerate(batch.captions) if caption == "with"} == batch.lows.keys()
    assert all(torch.equal(low, from_pil(plain_picture(100, size=4))) for low in batch.lows.values())
    with pytest.raises(ValueError, match="jitter would move a picture away from its low_column"):
        DataConfig(sources=(source,), jitter=0.1)
    base = {"name": "base", "resolution": 8}
    with pytest.raises(ValueError, match="low_column is for super-resolution stages"):
        TrainConfig.model_validate({"output": "run", "stage": base, "data": {"sources": (source,)}})


def test_each_source_draws_its_own_pictures(tmp_path: Path, stage: StageConfig) -> None:
    write_folder(tmp_path, 4)
    folder = FolderSource(path=str(tmp_path))
    orders = []
    data = DataConfig(sources=(folder, folder), caption_dropout=0.0)
    views = Views(data, stage, 0)
    for source in range(2):
        mixture = Mixture([1.0, 1.0], 0)
        numbers = [number for number in range(60) if mixture.locate(number)[0] == source][:20]
        orders.append([views[number].caption for number in numbers])
    assert orders[0] != orders[1]


class Stuck(Dataset[int]):
    """The first item comes, the others never."""

    def __getitem__(self, place: int) -> int:
        if place:
            time.sleep(600)
        return place


@pytest.mark.slow
def test_a_reading_process_that_hangs_ends_with_the_iterator() -> None:
    items = read_by_workers(Stuck(), range(4), workers=2)
    assert next(items) == 0
    before = multiprocessing.active_children()
    assert len(before) == 2
    started = time.monotonic()
    items.close()
    for process in before:
        process.join(timeout=10)
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 60


KILLED = """
import itertools, multiprocessing, sys, time
from cascade.data.workers import read_by_workers

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    items = read_by_workers(range(1000), itertools.count(), workers=2)
    next(items)
    print("reading", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_reading_processes_end_when_theirs_is_killed(tmp_path: Path, start_method: str) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script, start_method], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(others) >= 2
    deadline = time.monotonic() + 60
    while any(map(runs, others)):
        assert time.monotonic() < deadline, [other.cmdline() for other in others if runs(other)]
        time.sleep(0.1)


def runs(process: psutil.Process) -> bool:
    """Not ended, nor only waiting for someone to take note of it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def process_of(captions: list[str]) -> tuple[int, int]:
    """Who looked at how many captions."""
    return os.getpid(), len(captions)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_asked_of_captions_is_made_where_they_are_read(stage: StageConfig, workers: int) -> None:
    data = DataConfig(sources=(ScenesSource(),))
    data = data.model_copy(update={"workers": workers})
    with closing(batches(data, stage, 0, batch_size=3, of_captions=process_of)) as stream:
        process, count = next(stream).of_captions  # type: ignore[misc]
    assert count == 3
    assert (process == os.getpid()) == (workers == 0)
