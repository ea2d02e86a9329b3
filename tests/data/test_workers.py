"""Reading processes: a dead one is noticed, and small shared memory is avoided."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cascade.data import workers as module
from cascade.data.workers import ReaderDiedError, read_by_workers

PATIENCE_SECONDS = 30


class Numbers(Dataset[Tensor]):
    """Tensors of their numbers; number `fatal` kills the process that reads it."""

    def __init__(self, fatal: int = -1) -> None:
        self.fatal = fatal

    def __getitem__(self, number: int) -> Tensor:
        if number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((1000,), number)


@dataclass
class Once:
    """What can be pickled once, to be measured, and not again, to be handed over."""

    left: int = 1

    def __reduce__(self) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return Once, ()


class OfOnce(Dataset[Once]):
    def __getitem__(self, number: int) -> Once:
        return Once()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_reader_that_is_killed_is_told_and_not_waited_for(workers: int) -> None:
    start, seen = time.monotonic(), []
    with pytest.raises(ReaderDiedError, match=r"was killed, usually for lack of memory; lower data\.workers"):
        seen += [int(item[0]) for item in read_by_workers(Numbers(fatal=5), range(100), workers)]
    assert time.monotonic() - start < PATIENCE_SECONDS
    assert multiprocessing.active_children() == []


class Faulty(Dataset[int]):
    def __getitem__(self, number: int) -> int:
        raise (RuntimeError, FileNotFoundError)[number]("of its own")


@pytest.mark.parametrize(("number", "kind"), [(0, RuntimeError), (1, FileNotFoundError)])
def test_an_error_in_a_reader_that_lives_is_that_error(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="of its own"):
        list(read_by_workers(Faulty(), [number], 1))


def test_what_cannot_be_handed_over_ends_its_reader_and_is_not_waited_for() -> None:
    """As with shared memory that is full or read-only; Python would print the error, and go on."""
    start = time.monotonic()
    with pytest.raises(ReaderDiedError):
        list(read_by_workers(OfOnce(), range(4), 1))
    assert time.monotonic() - start < PATIENCE_SECONDS


def numbers(workers: int) -> list[int]:
    return [int(item[-1]) for item in read_by_workers(Numbers(), range(20), workers)]


def test_small_shared_memory_is_done_without_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        module, "shared_memory", lambda: (Path("/dev/shm"), 8000)
    )  # of one item, and less than two processes may need
    assert numbers(2) == list(range(20))
    (record,) = caplog.records
    assert "0.0 MB free, too little for data.workers: items are sent through pipes" in record.message


def test_without_any_shared_memory_the_process_reads_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing, "Lock", refuse)
    assert numbers(2) == list(range(20))
    assert "/dev/shm cannot be written, so no reading processes can start; the main process reads" in caplog.text


@dataclass
class Pair:
    """Tensors of several types beside other values."""

    images: Tensor
    names: list[str]
    more: dict[int, Tensor]


class Pairs(Dataset[Pair]):
    def __getitem__(self, number: int) -> Pair:
        rng = torch.Generator().manual_seed(number)
        odd = torch.randint(0, 255, (3, 5, 7), generator=rng, dtype=torch.uint8)
        return Pair(odd, [str(number)], {4: torch.randn(3, generator=rng).to(torch.bfloat16), 5: torch.empty(0, 2)})


def test_tensors_of_an_item_arrive_in_one_block_with_their_values_types_and_shapes() -> None:
    for number, item in enumerate(read_by_workers(Pairs(), range(5), 2)):
        expected = Pairs()[number]
        assert item.names == expected.names
        assert torch.equal(item.images, expected.images)
        assert item.more.keys() == expected.more.keys()
        for key, tensor in item.more.items():
            assert tensor.dtype == expected.more[key].dtype
            assert torch.equal(tensor, expected.more[key])
        blocks = {tensor.untyped_storage().data_ptr() for tensor in (item.images, item.more[4])}
        assert len(blocks) == 1
