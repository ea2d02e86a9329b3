"""Only one run writes into a folder, and a run determines its number of processes."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from helpers_processes import CONTEXT, PRELOADED, finish, start
from helpers_training import WordEncoder, log_entries, micro_config, trainer

from cascade.errors import CascadeError
from cascade.training import accelerator
from cascade.training.state import only_writer

# --- the lock --------------------------------------------------------------------------------------------------------


def hold(output: str, ready: Any, forks: bool) -> None:
    """Take a run's folder, fork perhaps as a loader does, and wait to be killed."""
    with only_writer(Path(output)):
        if forks:
            multiprocessing.get_context("fork").Process(target=signal.pause).start()
            ready.put(multiprocessing.active_children()[0].pid)
        ready.put(os.getpid())
        signal.pause()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path: Path, resume: bool) -> None:
    config = micro_config(tmp_path / "run", "training.steps=8")

    def second(call: int) -> None:
        if call == 3:
            with pytest.raises(CascadeError, match=rf"another run writes into this folder \(process {os.getpid()} on "):
                trainer(config).run(resume=resume)

    assert trainer(config, WordEncoder(second)).run()
    assert [entry["step"] for entry in log_entries(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a forked child"])
def test_a_killed_writer_leaves_the_folder_free_at_once(tmp_path: Path, forks: bool) -> None:
    """Also while processes that it forked still live, as those that read pictures may for a moment."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    ready = CONTEXT.Queue()
    output = tmp_path / "run"
    process = CONTEXT.Process(target=hold, args=(str(output), ready, forks))
    process.start()
    child = ready.get(timeout=60) if forks else None
    assert ready.get(timeout=60) == process.pid
    with pytest.raises(CascadeError, match=f"process {process.pid} on "), only_writer(output):
        pass
    process.kill()
    process.join()
    try:
        assert trainer(micro_config(output)).run()
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)  # it was there all the while


def test_a_run_that_failed_leaves_the_folder_free(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run", "training.save_every=1")

    def fail(call: int) -> None:
        if call == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(config, WordEncoder(fail)).run()
    assert trainer(config).run(resume=True)


def test_a_run_that_is_not_there_leaves_no_folder_when_it_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="no usable checkpoint to resume from"):
        trainer(micro_config(tmp_path / "mistyped")).run(resume=True)
    assert not (tmp_path / "mistyped").exists()


def test_where_there_are_no_locks_a_run_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unable(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("cascade.system.lock", unable)
    with caplog.at_level(logging.WARNING, "cascade.files"):
        assert trainer(micro_config(tmp_path / "run")).run()
    assert "no locks on this file system; make sure no other run writes into this folder" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CascadeError, match=r"run: cannot be written: Not a directory"):
        trainer(micro_config(tmp_path / "file" / "run")).run()


# --- how many processes there are ------------------------------------------------------------------------------------


class Seen:
    """accelerate's PartialState: on a machine without GPUs it sees several processes where it is told of the CPU."""

    told: list[bool]
    device = torch.device("cpu")

    def __init__(self, cpu: bool = False, timeout: timedelta | None = None) -> None:  # noqa: ARG002 - accelerate's own
        if not Seen.told:
            Seen.told.append(cpu)
        self.num_processes = int(os.environ.get("WORLD_SIZE", "1")) if Seen.told[0] else 1

    @staticmethod
    def _reset_state() -> None:
        Seen.told.clear()


@pytest.mark.parametrize(
    ("environment", "cpu"),
    [
        ({}, False),
        ({"ACCELERATE_USE_CPU": "true"}, True),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, True),
        ({"WORLD_SIZE": "2"}, True),  # as torchrun starts them
    ],
)
def test_accelerate_uses_the_cpu_where_it_would_otherwise_see_each_process_alone(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cpu: bool
) -> None:
    """It keeps the first answer for the process, so the first question must be asked well."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(accelerator, "PartialState", Seen)
    Seen.told = []
    assert accelerator.expected_processes()[0] == int(environment.get("WORLD_SIZE", "1"))
    assert Seen.told == [cpu]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On GPUs: each would train a run of its own."""
    monkeypatch.setenv(name, "4")
    alone = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(accelerator, "PartialState", lambda **_options: alone)
    with pytest.raises(
        CascadeError, match="4 processes were launched, but accelerate found 1 of them; start them with"
    ):
        accelerator.expected_processes()


def two_of_us(rank: int, output: str) -> None:
    """As torchrun starts them: nothing says that the CPU is meant."""
    del os.environ["ACCELERATE_USE_CPU"]
    run = trainer(micro_config(Path(output)))
    assert (run.accelerator.num_processes, run.accelerator.process_index) == (2, rank)
    assert PartialState().device.type == "cpu"
    assert run.run()


@pytest.mark.slow
def test_processes_without_a_gpu_see_each_other_by_default(tmp_path: Path) -> None:
    assert finish(start(two_of_us, str(tmp_path / "run"), processes=2), timeout_seconds=120) == [0, 0]
    assert [entry["step"] for entry in log_entries(tmp_path / "run")] == [1, 2, 3, 4]
