"""A run killed at random moments and resumed equals an uninterrupted one: weights, averages, log and pictures."""

from __future__ import annotations

import io
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers_processes import count_events, finish, random_kill, start, train
from helpers_training import log_entries, micro_config, write_pictures
from PIL import Image

from cascade.training.state import load_newest

pytestmark = pytest.mark.slow

SAVE_EVERY = 4
# Entries of the log, validations and sample grids fall between checkpoints and on them.
SETTINGS = (
    f"training.save_every={SAVE_EVERY}",
    "training.log_every=3",
    "training.sample_every=6",
    "training.sample_prompts=[red]",
    "training.validation={sources: [{kind: scenes, held_out: true}], every: 5, batches: 1}",
    "stage.model.dropout=0.2",
)


def assert_kills_change_nothing(tmp_path: Path, kills: int, steps: int, processes: int, *changes: str) -> None:
    """Train once without and once with kills; both end alike, and some of the kills fell into writing."""
    settings = [*SETTINGS, *changes, f"training.steps={steps}"]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    assert finish(start(count_events, settings, whole, processes=processes)) == [0] * processes
    events_per_save = int(Path(f"{whole}.events").read_text()) * SAVE_EVERY // steps
    rng, unfinished = random.Random(6), 0
    for life in range(kills):
        kill = random_kill(rng, SAVE_EVERY, events_per_save)
        killed = 0 if kill.event else rng.randrange(processes)  # only the first process writes
        codes = finish(start(train, settings, broken, kill, killed, processes=processes))
        assert -signal.SIGKILL in codes, f"life {life} was not killed by {kill}: {codes}"
        unfinished += any(path.name != ".lock" for path in Path(broken).rglob(".*"))
    assert unfinished >= kills // 6, "hardly a kill fell into writing"
    assert finish(start(train, settings, broken, processes=processes)) == [0] * processes
    assert_same_run(Path(whole), Path(broken), settings)


def assert_same_run(one: Path, other: Path, settings: Sequence[str]) -> None:
    """Bit for bit, and nothing half-written is left."""
    a, b = (load_newest(output, micro_config(output, *settings)) for output in (one, other))
    assert a.step == b.step
    for part in ("network", "ema", "optimizer"):
        tensors, others = getattr(a, part), getattr(b, part)
        assert tensors.keys() == others.keys()
        assert not [name for name in tensors if not torch.equal(tensors[name], others[name])], part
    assert a.optimizer, "an empty optimizer state proves nothing"
    assert log_entries(one) == log_entries(other)
    assert contents(one) == contents(other)


def contents(output: Path) -> dict[str, bytes]:
    """Finished stage and sample pictures, and the names of all else."""
    kept = {path.relative_to(output): path for path in sorted(output.rglob("*")) if path.is_file()}
    compared = ("stage", "samples")
    return {str(name): path.read_bytes() if name.parts[0] in compared else b"" for name, path in kept.items()}


def picture(shade: int) -> Image.Image:
    return Image.linear_gradient("L").resize((8, 8)).point(lambda value: (value + 9 * shade) % 256).convert("RGB")


def folder_of_pictures(folder: Path) -> str:
    write_pictures(folder, {f"picture {index}": picture(index) for index in range(7)})
    return f"data.sources=[{{kind: folder, path: {folder}}}]"


def stream(folder: Path) -> str:
    """A local dataset of two Parquet files, read as a stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for part in range(2):
        numbers = range(13 * part, 13 * part + 13)
        columns = {"image": [{"bytes": png(n)} for n in numbers], "caption": [f"picture {n}" for n in numbers]}
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return f"data.sources=[{{kind: datasets, name: {folder}, streaming: true, shuffle_buffer: 5}}]"


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 20, 240, 1)


def test_three_kills_of_two_processes_change_nothing(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, 40, 2)


def test_three_kills_change_nothing_of_a_stream(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, 40, 1, stream(tmp_path / "stream"))


def test_three_kills_change_nothing_with_reading_processes(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, 40, 1, folder_of_pictures(tmp_path / "pictures"), "data.workers=2")


def test_three_kills_change_nothing_of_two_processes_with_a_stream_and_reading_processes(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, 40, 2, stream(tmp_path / "stream"), "data.workers=1")


def test_three_kills_change_nothing_of_muon(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 3, 40, 1, "training.optimizer.kind=muon")
