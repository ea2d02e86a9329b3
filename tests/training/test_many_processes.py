"""Several processes never wait for each other forever, and their number may change on resume."""

from __future__ import annotations

import errno
import signal
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers_processes import finish, start
from helpers_training import WordEncoder, log_entries, micro_config, trainer

from cascade.errors import CascadeError
from cascade.training.accelerator import TIMEOUT, _cpu_group, any_process
from cascade.training.state import load_newest

pytestmark = pytest.mark.slow

EVERYTHING_EACH_STEP = (
    "training.save_every=1",
    "training.sample_every=10",
    "training.sample_prompts=[red]",
    "training.validation={sources: [{kind: scenes, held_out: true}], every: 5, batches: 1}",
)
STEPS = ("training.batch_size=8", "training.save_every=3", "training.loss.stratified=true")


def train(rank: int, assignments: Sequence[str], output: str, resume: bool) -> None:
    run = trainer(micro_config(Path(output), *assignments))
    assert run.accelerator.num_processes == 2
    assert type(run.network).__name__ == "DistributedDataParallel"
    assert run.accelerator.is_main_process == (rank == 0)
    assert run.run(resume=resume)


def two(output: Path, *changes: str, resume: bool = False) -> None:
    assert finish(start(train, changes, str(output), resume, processes=2), timeout_seconds=120) == [0, 0]


def test_fifty_starts_with_two_saves_each_never_wait_forever(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for start_number in range(50):
        steps = 2 * (start_number + 1)
        two(run, *EVERYTHING_EACH_STEP, f"training.steps={steps}", resume=start_number > 0)
    assert load_newest(run, micro_config(run, "training.steps=100")).step == 100
    assert [entry["step"] for entry in log_entries(run)] == list(range(1, 101))
    assert len(list((run / "samples").iterdir())) == 50  # the last step of each start, every tenth among them


@pytest.mark.parametrize("first", [2, 1])
def test_a_run_resumes_in_another_number_of_processes(tmp_path: Path, first: int) -> None:
    """3 steps in as many processes, 3 in the other number: the run of one process, but for the order of sums."""
    alone, changed = (micro_config(tmp_path / name, *STEPS, "training.steps=6") for name in ("alone", "changed"))
    assert trainer(alone).run()
    short = micro_config(tmp_path / "changed", *STEPS, "training.steps=3")
    if first == 2:
        two(tmp_path / "changed", *STEPS, "training.steps=3")
        assert trainer(changed).run(resume=True)
    else:
        assert trainer(short).run()
        two(tmp_path / "changed", *STEPS, "training.steps=6", resume=True)
    for entry, other in zip(log_entries(tmp_path / "alone"), log_entries(tmp_path / "changed"), strict=True):
        assert other["step"] == entry["step"]
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-3)
    a, b = (load_newest(tmp_path / name, alone) for name in ("alone", "changed"))
    for name, weights in a.network.items():
        # Adam divides a small gradient by its own size, so rounding shows as a share of the learning rate.
        torch.testing.assert_close(b.network[name], weights, rtol=0, atol=0.1 * 1e-2, msg=name)


def train_and_stop(rank: int, assignments: Sequence[str], output: str, step: int) -> None:
    """The second process alone is asked to stop."""

    def interrupt(call: int) -> None:
        if rank == 1 and call == step:
            signal.raise_signal(signal.SIGTERM)

    run = trainer(micro_config(Path(output), *assignments), WordEncoder(interrupt))
    assert not run.run()


def test_a_stop_at_a_step_with_a_validation_changes_nothing_of_two_processes(tmp_path: Path) -> None:
    """What the stopped processes left undone is done after the resume, by both."""
    changes = (*EVERYTHING_EACH_STEP, "training.sample_every=5", "training.steps=10")
    two(tmp_path / "whole", *changes)
    assert finish(start(train_and_stop, changes, str(tmp_path / "stopped"), 5, processes=2)) == [0, 0]
    assert not (tmp_path / "stopped" / "samples").exists()
    two(tmp_path / "stopped", *changes, resume=True)
    assert log_entries(tmp_path / "whole") == log_entries(tmp_path / "stopped")
    names = {
        name: sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("whole", "stopped")
    }
    assert names["whole"] == names["stopped"] == ["step-00000005.png", "step-00000010.png"]


def full_disk(rank: int, output: str) -> None:
    """The first process cannot write; both must say so."""
    run = trainer(micro_config(Path(output)))

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch("cascade.files.tensors.save_file", full):
        try:
            run.run()
        except CascadeError as error:
            Path(f"{output}.{rank}.txt").write_text(str(error))


def poisoned(rank: int, output: str) -> None:
    """The second process sees a loss that is not finite; both must stop."""

    def poison(call: int) -> None:
        if rank == 1 and call == 2:
            run.stage.network.head.bias.data[0] = float("nan")

    run = trainer(micro_config(Path(output)), WordEncoder(poison))
    try:
        run.run()
    except CascadeError as error:
        Path(f"{output}.{rank}.txt").write_text(str(error))


def broken(rank: int, output: str) -> None:
    """The first process meets an error of another kind than ours in its first grid; the second must not wait for it."""
    run = trainer(micro_config(Path(output), "training.sample_every=1", "training.sample_prompts=[red]"))
    expected: type[Exception] = ZeroDivisionError if rank == 0 else CascadeError

    def divide(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("division by zero")

    with patch("cascade.training.actions.SampleGrid.drawn", divide):
        try:
            run.run()
        except expected as error:
            Path(f"{output}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (full_disk, "No space left"),
        (poisoned, "the loss is not finite at step 2, "),
        (broken, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_in_one_process_ends_all(tmp_path: Path, target: object, message: str) -> None:
    output = tmp_path / "run"
    assert finish(start(target, str(output), processes=2), timeout_seconds=120) == [0, 0]  # type: ignore[arg-type]
    assert all(message in Path(f"{output}.{rank}.txt").read_text() for rank in (0, 1))


def test_a_process_whose_own_views_are_sound_says_that_another_names_the_bad_ones(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert finish(start(poisoned, str(output), processes=2), timeout_seconds=120) == [0, 0]
    healthy, sick = (Path(f"{output}.{rank}.txt").read_text() for rank in (0, 1))
    assert "step 2, in another process, which names the views;" in healthy
    assert "step 2, views [6, 7] ([" in sick


def wait_at_most(_rank: int, output: str) -> None:
    """What processes of a run have agreed on."""
    assert trainer(micro_config(Path(output))).accelerator.num_processes == 2
    group = torch.distributed.group.WORLD
    assert group is not None
    assert group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT


def test_processes_wait_for_each_other_as_long_as_we_say(tmp_path: Path) -> None:
    assert finish(start(wait_at_most, str(tmp_path), processes=2)) == [0, 0]


def ask_cpu_group(rank: int, output: str) -> None:
    """A flag of one process, told to the other by the CPUs, whatever the processes compute on."""
    accelerator = trainer(micro_config(Path(output))).accelerator
    group = _cpu_group(torch.device("cuda"))
    assert group is not None
    assert torch.distributed.get_backend(group) == "gloo"
    with patch("cascade.training.accelerator._cpu_group", lambda _device: group):
        assert any_process(accelerator, rank == 1)
        assert not any_process(accelerator, False)


def test_processes_on_gpus_tell_each_other_to_stop_without_them(tmp_path: Path) -> None:
    assert finish(start(ask_cpu_group, str(tmp_path), processes=2)) == [0, 0]
