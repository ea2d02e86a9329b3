"""Processes that read for the one that trains, and what is said when one of them dies."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import queues
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from cascade.errors import CascadeError
from cascade.system import CHILD_ENDED, shared_memory

logger = logging.getLogger("cascade.data")

T = TypeVar("T")

_AHEAD = 3  # items of a process that may lie in shared memory: two that wait, one that is made


class ReaderDiedError(CascadeError):
    """One of the processes that read is gone, and with it what it was to read."""


def read_by_workers(items: Dataset[T], places: Iterable[Any], workers: int) -> Generator[T, None, None]:
    """`items[place]` for each of the places, in their order, read by other processes, which end with the iterator.

    They hand over through shared memory, or through pipes where that is small; where there is none at all, no process
    can be started, and this one reads. Raises ReaderDiedError within seconds when one of them is killed.
    """
    if not _can_start():
        place, _ = shared_memory() or ("shared memory", 0)
        logger.warning("%s cannot be written, which processes need that read; this one reads", place)
        yield from map(items.__getitem__, places)
        return
    with warnings.catch_warnings():
        # How many workers to start is the user's choice, also on a machine with fewer cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Handed(items, workers),
            sampler=places,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
        )
        before = multiprocessing.active_children()
        with _deaths_found_by_asking():
            loaded = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in before]
    try:
        with _death_told():
            yield from _taken(loaded)
    finally:
        # The loader's iterator asks its workers to end when it goes, and it must go now, not at a later collection.
        del loaded
        for process in started:
            process.kill()  # one that hangs, on a disk perhaps; Python would wait for it when it ends


@dataclass(frozen=True)
class _Piped:
    """An item that does not touch shared memory."""

    content: bytes


class _Handed(Dataset["T | _Piped"], Generic[T]):
    """Items as they are handed to the process that asked: as they are, or, where shared memory is small, as bytes.

    Tensors travel in shared memory, where a process that finds no room dies, or waits for ever.
    """

    def __init__(self, items: Dataset[T], workers: int) -> None:
        self._items, self._workers = items, workers
        self._size: int | None = None  # of an item; all are about as large

    def __getitem__(self, place: Any) -> T | _Piped:
        item = self._items[place]
        if self._size is None:
            self._size = len(pickle.dumps(item))
        return item if self._size * _AHEAD * self._workers < _free_bytes() else _Piped(pickle.dumps(item))


def _taken(loaded: Iterator[T | _Piped]) -> Iterator[T]:
    told = False
    for item in loaded:
        if not isinstance(item, _Piped):
            yield item
            continue
        if not told:
            place, free = shared_memory() or ("shared memory", 0)
            logger.warning(
                "%s has %.1f MB free, too little for data.workers: what they read comes through pipes, which takes"
                " longer; a container gets more by --shm-size", place, free / 1e6,
            )  # fmt: skip
            told = True
        yield pickle.loads(item.content)


def _free_bytes() -> float:
    """Of shared memory; without limit where a system sets none."""
    limited = shared_memory()
    return float("inf") if limited is None else limited[1]


def _can_start() -> bool:
    """Whether locks between processes can be made: they lie in shared memory, too."""
    try:
        multiprocessing.Lock()
    except OSError:
        return False
    return True


@contextmanager
def _deaths_found_by_asking() -> Iterator[None]:
    """torch has a killed child raise an error wherever the program is, in the middle of an optimizer's step too.

    Without that it finds out when it waits for a batch, where it looks every five seconds.
    """
    handler = None if CHILD_ENDED is None else signal.getsignal(CHILD_ENDED)
    yield
    if CHILD_ENDED is not None and threading.current_thread() is threading.main_thread():
        signal.signal(CHILD_ENDED, handler)


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # An error inside a process that lives on comes with its type, and these words.
        if "in DataLoader worker process" in str(error) or isinstance(error, CascadeError):
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        # The others: it died after it had handed a tensor over, and before that was taken.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReaderDiedError(
            "a process that reads pictures was killed, as a rule for want of memory; lower data.workers, or give more"
            f" memory, in a container also shared memory ({reason})"
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process of a run, but the training process decides.

    When it is killed its workers end, too. torch's own look at the parent's number does not see it where a fork server
    starts them, as Python 3.14 does: the server is the parent, and lives as long as any of them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(_error: Exception, _item: Any) -> None:
    """What cannot be handed over would be waited for: Python prints such an error, and goes on."""
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
