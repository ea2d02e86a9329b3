"""Processes that read for the one that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def read_by_workers(items: Dataset[T], places: Iterable[Any], workers: int) -> Generator[T, None, None]:
    """`items[place]` for each of the places, in their order, read by other processes, which end with the iterator."""
    with warnings.catch_warnings():
        # How many workers to start is the user's choice, also on a machine with fewer cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            items,
            sampler=places,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
        )
        before = multiprocessing.active_children()
        loaded = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in before]
    try:
        yield from loaded
    finally:
        # The loader's iterator asks its workers to end when it goes, and it must go now, not at a later collection.
        del loaded
        for process in started:
            process.kill()  # one that hangs, on a disk perhaps; Python would wait for it when it ends


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process of a run, but the training process decides.

    When it is killed its workers end, too. torch's own look at the parent's number does not see it where a fork server
    starts them, as Python 3.14 does: the server is the parent, and lives as long as any of them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
