"""Two processes with half the batch each are one process with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_training import log_entries, micro_config, trainer

from cascade.config import TrainConfig
from cascade.training.state import RunState, load_newest

TESTS = Path(__file__).parents[1]
SCRIPT = """
import json, os, sys
from pathlib import Path
from helpers_training import micro_config, trainer
run = trainer(micro_config(Path(sys.argv[1]), *sys.argv[3:]))
accelerator = run.accelerator
count = {"processes": accelerator.num_processes, "network": type(run.network).__name__}
Path(sys.argv[2], f"{accelerator.process_index}.json").write_text(json.dumps(count))
assert run.run(resume="--resume" in os.environ.get("RUN_OPTIONS", ""))
"""
# Accumulation tests no_sync as well; AdamW with betas near 1 divides a gradient by its running size, so where that is
# itself rounding noise the update is too. 3 steps and a tolerance of a few per cent of the learning rate bear it.
CHANGES = ("training.steps=3", "training.batch_size=8", "training.accumulation=2", "training.loss.stratified=true")
LEARNING_RATE = 1e-2

pytestmark = pytest.mark.slow


def launch(folder: Path, output: Path, *changes: str, resume: bool = False) -> None:
    """The run in two processes, and proof from inside that there were two."""
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "RUN_OPTIONS": "--resume" if resume else "",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launcher, str(script), str(output), str(folder), *changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [json.loads((folder / f"{process}.json").read_text()) for process in (0, 1)]
    assert counts == [{"processes": 2, "network": "DistributedDataParallel"}] * 2


def state_of(config: TrainConfig) -> RunState:
    return load_newest(Path(config.output), config)


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    one, two = (micro_config(tmp_path / name, *CHANGES) for name in ("one", "two"))
    assert trainer(one).run()
    launch(tmp_path / "script", Path(two.output), *CHANGES)
    for entry, other in zip(log_entries(Path(one.output)), log_entries(Path(two.output)), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)  # loss, its bands, and the norm of the gradient
    a, b = state_of(one), state_of(two)
    for name, weights in a.network.items():
        torch.testing.assert_close(b.network[name], weights, rtol=0, atol=0.05 * LEARNING_RATE, msg=name)


def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    changes = ("training.save_every=2", *CHANGES)
    whole, halves = (micro_config(tmp_path / name, *changes) for name in ("whole", "halves"))
    launch(tmp_path / "script", Path(whole.output), *changes)
    launch(tmp_path / "script", Path(halves.output), *changes)
    (last,) = Path(halves.output, "checkpoints").glob("step-00000003")
    last.rename(tmp_path / "lost")
    launch(tmp_path / "script", Path(halves.output), *changes, resume=True)
    a, b = state_of(whole), state_of(halves)
    assert a.step == b.step == 3
    for part in ("network", "ema", "optimizer"):
        tensors, others = getattr(a, part), getattr(b, part)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), part
    assert log_entries(Path(whole.output)) == log_entries(Path(halves.output))
