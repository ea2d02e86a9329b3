"""Processes that read data for the training process, and the error when one of them dies."""

from __future__ import annotations

import io
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

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.errors import CascadeError
from cascade.system import CHILD_ENDED, shared_memory

logger = logging.getLogger("cascade.data")

T = TypeVar("T")

_ALIGNED = 64  # bytes; views of other types need a multiple of their size
_AHEAD = 3  # items of a process in shared memory at most: two waiting, one in progress


class ReaderDiedError(CascadeError):
    """A reading process died before it delivered its items."""


def read_by_workers(items: Dataset[T], places: Iterable[Any], workers: int) -> Generator[T, None, None]:
    """`items[place]` for each of the places, in order, read by other processes, which end with the iterator.

    Items are passed through shared memory, or through pipes if that is small. Without any shared memory no process can
    be started, and the calling process reads. Raises ReaderDiedError within seconds when a reading process is killed.
    """
    if not _can_start():
        place, _ = shared_memory() or ("shared memory", 0)
        logger.warning("%s cannot be written, so no reading processes can start; the main process reads", place)
        yield from map(items.__getitem__, places)
        return
    with warnings.catch_warnings():
        # The number of workers is the user's choice, also on a machine with fewer cores.
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
        with _no_signal_on_death():
            loaded = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in before]
    try:
        with _deaths_as_errors():
            yield from _taken(loaded)
    finally:
        # Deleting the loader's iterator ends its workers; this must not wait for garbage collection.
        del loaded
        for process in started:
            process.kill()  # a hanging one, for example on a disk; Python would wait for it at exit
        for process in started:
            process.join(timeout=5)  # else it is a zombie for a while


@dataclass(frozen=True)
class _Piped:
    """An item that does not touch shared memory."""

    content: bytes


@dataclass(frozen=True)
class _Packed:
    """An item whose tensors lie in one block of shared memory, as each tensor sent takes a connection of its own.

    content: the item, pickled, with numbers in place of tensors. block: uint8. places: of each tensor, its first byte,
    dtype and shape.
    """

    content: bytes
    block: Tensor
    places: list[tuple[int, torch.dtype, torch.Size]]

    @classmethod
    def of(cls, item: object) -> _Packed | None:
        """The item, packed; None if it has no two tensors or cannot be pickled."""
        file = io.BytesIO()
        pickler = _WithoutTensors(file, pickle.HIGHEST_PROTOCOL)
        try:
            pickler.dump(item)
        except Exception:  # the process that sends it will meet the same error, and end
            return None
        if len(pickler.tensors) < 2:
            return None
        places, end = [], 0
        for tensor in pickler.tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(end))
        packed = cls(file.getvalue(), block, places)
        for place, tensor in zip(places, pickler.tensors, strict=True):
            packed._at(place).copy_(tensor)
        return packed

    def item(self) -> Any:
        """The item; its tensors share the block's memory."""
        return _WithTensors(io.BytesIO(self.content), [self._at(place) for place in self.places]).load()

    def _at(self, place: tuple[int, torch.dtype, torch.Size]) -> Tensor:
        start, dtype, shape = place
        return self.block[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _WithoutTensors(pickle.Pickler):
    """A pickler that sets tensors in memory aside, in the order in which it meets them."""

    tensors: list[Tensor]

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors = []

    def persistent_id(self, value: object) -> int | None:
        if type(value) is not Tensor or value.device.type != "cpu" or value.is_sparse or value.requires_grad:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _WithTensors(pickle.Unpickler):
    """Reads what `_WithoutTensors` wrote, with the tensors in their places."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self.tensors[number]


class _Handed(Dataset["T | _Piped | _Packed"], Generic[T]):
    """Items in the form in which they are passed on: unchanged, packed, or as bytes if shared memory is small.

    Tensors are passed in shared memory; a process that finds no room there dies or waits for ever.
    """

    def __init__(self, items: Dataset[T], workers: int) -> None:
        self._items, self._workers = items, workers
        self._size: int | None = None  # of one item; all have about the same size

    def __getitem__(self, place: Any) -> T | _Piped | _Packed:
        item = self._items[place]
        if self._size is None:
            self._size = len(pickle.dumps(item))
        if self._size * _AHEAD * self._workers >= _free_bytes():
            return _Piped(pickle.dumps(item))
        return _Packed.of(item) or item


def _taken(loaded: Iterator[T | _Piped | _Packed]) -> Iterator[T]:
    told = False
    for item in loaded:
        if isinstance(item, _Packed):
            yield item.item()
            continue
        if not isinstance(item, _Piped):
            yield item
            continue
        if not told:
            place, free = shared_memory() or ("shared memory", 0)
            logger.warning(
                "%s has %.1f MB free, too little for data.workers: items are sent through pipes, which takes longer;"
                " start the container with a larger --shm-size", place, free / 1e6,
            )  # fmt: skip
            told = True
        yield pickle.loads(item.content)


def _free_bytes() -> float:
    """Free bytes of shared memory; infinite if the system sets no limit."""
    limited = shared_memory()
    return float("inf") if limited is None else limited[1]


def _can_start() -> bool:
    """Whether locks between processes can be created; they also need shared memory."""
    try:
        multiprocessing.Lock()
    except OSError:
        return False
    return True


@contextmanager
def _no_signal_on_death() -> Iterator[None]:
    """Disable torch's signal handler, by which a killed child raises an error anywhere, even in an optimizer's step.

    Without it the death is noticed while waiting for a batch, within five seconds.
    """
    handler = None if CHILD_ENDED is None else signal.getsignal(CHILD_ENDED)
    yield
    if CHILD_ENDED is not None and threading.current_thread() is threading.main_thread():
        signal.signal(CHILD_ENDED, handler)


@contextmanager
def _deaths_as_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # An error in a process that is still alive has its type and these words.
        if "in DataLoader worker process" in str(error) or isinstance(error, CascadeError):
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        # Any other: the process died after it had sent a tensor that was not yet received.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReaderDiedError(
            "a process that reads pictures was killed, usually for lack of memory; lower data.workers, or provide more"
            f" memory, in a container also shared memory ({reason})"
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _begin_worker(_worker: int) -> None:
    """Ignore Ctrl-C and a batch system's SIGTERM, which reach every process of a run: the training process decides.

    End when the training process is killed. torch compares the parent's process id, which fails with a fork server, the
    default of Python 3.14: the server is the parent, and lives as long as any worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(_error: Exception, _item: Any) -> None:
    """End the worker when an item cannot be sent: Python would only print the error, and the receiver would wait."""
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
