"""Training runs in separate processes that can be killed. A fork server avoids importing in each of them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers_training import WordEncoder, micro_config, trainer

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["helpers_processes", "cascade.training.trainer", "datasets", "torch.distributed.fsdp"]
TIMEOUT_SECONDS = 300
SAVE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """The moment at which a training process kills itself by SIGKILL.

    After `encodings` batches of captions and another `delay_seconds`, at any point; or just before the `event`-th
    time that it opens, renames or removes a file in its run's folder.
    """

    encodings: int = 0
    delay_seconds: float = 0.0
    event: int = 0


def start(target: Callable[..., None], *arguments: Any, processes: int = 1) -> list[Any]:
    """Processes that run `target(rank, *arguments)`, with a launcher's environment if there are several."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    port = free_port()
    started = [
        CONTEXT.Process(target=_run, args=(target, rank, processes, port, arguments)) for rank in range(processes)
    ]
    search_path = os.pathsep.join(path for path in sys.path if path)  # the server has none of its own
    with patch.dict(os.environ, PYTHONPATH=search_path):
        for process in started:
            process.start()
    return started


def finish(processes: Sequence[Any], timeout_seconds: float = TIMEOUT_SECONDS) -> list[int]:
    """Exit codes. When one process fails, the others are killed, as by a launcher."""
    waiting = list(processes)
    try:
        while waiting:
            ready = connection.wait([process.sentinel for process in waiting], timeout_seconds)
            assert ready, f"still running after {timeout_seconds} s: a deadlock"
            waiting = [process for process in waiting if process.sentinel not in ready]
            if any(process.exitcode for process in processes if process not in waiting):
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [int(process.exitcode) for process in processes]


def train(rank: int, assignments: Sequence[str], output: str, kill: Kill | None = None, killed: int = 0) -> None:
    """Train, or resume a killed run; the process of rank `killed` kills itself."""
    config = micro_config(Path(output), *assignments)
    resume = (Path(output) / "config.yaml").exists()
    armed = kill if rank == killed else None
    run = trainer(config, WordEncoder(_timer(armed), delay_seconds=0.003))
    if armed is not None and armed.event:
        _kill_before_event(output, armed.event)
    assert run.run(resume=resume)


def count_events(rank: int, assignments: Sequence[str], output: str) -> None:
    """Train, and write into OUTPUT.events how many events of `SAVE_EVENTS` there were."""
    events: list[str] = []
    sys.addaudithook(lambda name, arguments: events.append(name) if _concerns(output, name, arguments) else None)
    train(rank, assignments, output)
    if rank == 0:
        Path(f"{output}.events").write_text(str(len(events)))


def _run(target: Callable[..., None], rank: int, processes: int, port: int, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    target(rank, *arguments)


def _timer(kill: Kill | None) -> Callable[[int], None] | None:
    if kill is None or not kill.encodings:
        return None

    def before(encodings: int) -> None:
        if encodings == kill.encodings:
            threading.Timer(kill.delay_seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return before


def _kill_before_event(output: str, number: int) -> None:
    seen = [0]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if _concerns(output, name, arguments):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _concerns(output: str, name: str, arguments: tuple[Any, ...]) -> bool:
    return name in SAVE_EVENTS and bool(arguments) and str(arguments[0]).startswith(output)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def random_kill(rng: random.Random, save_every: int, events_per_save: int) -> Kill:
    """A random moment after a process' first checkpoint: in time, or among the disk operations of a save."""
    if rng.random() < 0.5:
        return Kill(encodings=save_every + 1 + rng.randrange(save_every), delay_seconds=rng.uniform(0, 0.03))
    return Kill(event=STARTING_EVENTS + events_per_save + rng.randrange(events_per_save))


STARTING_EVENTS = 20
"""More than a run has before its first step."""
