"""Two processes with half the batch each equal one process with the whole; started by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers_training import TEXT_DIM, WordEncoder, fill, log_entries, micro_settings, write_pictures
from PIL import Image

from cascade.cli.program import main
from cascade.config.data import TextConfig
from cascade.config.stage import StageConfig, save_stage
from cascade.config.training import TrainConfig
from cascade.settings import override, parse
from cascade.stage import build_stage
from cascade.storage.training import encoder_settings, load_train_config
from cascade.text.cache import EmbeddingCache
from cascade.training.state import RunState, load_newest

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
# Accumulation tests no_sync as well; AdamW with betas near 1 divides a gradient by its running size, so where that is
# itself rounding noise the update is too. 3 steps and a tolerance of a few per cent of the learning rate bear it.
CHANGES = ("training.steps=3", "training.batch_size=8", "training.accumulation=2", "training.loss.stratified=true")
LEARNING_RATE = 1e-2

OPTIONS = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *OPTIONS)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's file: pictures of a colour each, their captions' embeddings in a cache, weights none of which is zero."""
    folder = tmp_path_factory.mktemp("run")
    write_pictures(folder / "pictures", {name: Image.new("RGB", (8, 8), name) for name in COLOURS})
    written = override(
        micro_settings(folder / "unused")
        | {
            "text": {"cache": str(folder / "text")},
            "data": {"sources": [{"kind": "folder", "path": str(folder / "pictures")}]},
        },
        CHANGES,
    )
    config = parse(StageConfig, written["stage"], "stage")
    network = build_stage(config).network
    fill(network)
    save_stage(folder / "weights", config, network.state_dict())
    written["training"]["init_from"] = str(folder / "weights")
    cache = EmbeddingCache(folder / "text", "words", TEXT_DIM)
    texts = [*COLOURS, ""]
    cache.add(texts, WordEncoder().encode(texts).rows())
    cache.note_settings(encoder_settings(parse(TextConfig, written["text"], "text")))
    path = folder / "run.yaml"
    path.write_text(json.dumps(written))  # JSON is YAML
    return path


def launch(launcher: tuple[str, ...], settings: Path, output: Path, *changes: str) -> RunState:
    """`cascade train` by two processes that train together; what they saved last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if launcher is ACCELERATE:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", *launcher, "-m", "cascade", "train", str(settings), f"output={output}", *changes]
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        stdout, stderr = started.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # the launcher's processes, should they hang
    assert started.returncode == 0, stderr[-3000:]
    assert stdout.count("is trained") == 1, "each of the processes ran for itself"
    state = load_newest(output, config_of(settings, output, *changes))
    assert state.processes == 2
    return state


def config_of(settings: Path, output: Path, *changes: str) -> TrainConfig:
    return load_train_config(settings, [f"output={output}", *(change for change in changes if "=" in change)])


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate launch", "torchrun"])
def test_two_processes_give_the_weights_of_one(tmp_path: Path, settings: Path, launcher: tuple[str, ...]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", str(settings), f"output={one}"]) == 0
    together = launch(launcher, settings, two)
    for entry, other in zip(log_entries(one), log_entries(two), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)  # loss, its bands, and the norm of the gradient
    alone = load_newest(one, config_of(settings, one))
    for name, weights in alone.network.items():
        torch.testing.assert_close(together.network[name], weights, rtol=0, atol=0.05 * LEARNING_RATE, msg=name)


def test_two_processes_resume_bit_for_bit(tmp_path: Path, settings: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    a = launch(ACCELERATE, settings, whole, "training.save_every=2")
    launch(ACCELERATE, settings, halves, "training.save_every=2")
    (halves / "checkpoints" / "step-00000003").rename(tmp_path / "lost")
    b = launch(ACCELERATE, settings, halves, "training.save_every=2", "--resume")
    assert a.step == b.step == 3
    for part in ("network", "ema", "optimizer"):
        tensors, others = getattr(a, part), getattr(b, part)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), part
    assert log_entries(whole) == log_entries(halves)


def test_two_processes_save_at_each_step_without_meeting_each_other(tmp_path: Path, settings: Path) -> None:
    """As two runs in one folder, one start in three died of the other's unfinished files."""
    output = tmp_path / "run"
    launch(ACCELERATE, settings, output, "training.steps=25", "training.save_every=1")
    assert [entry["step"] for entry in log_entries(output)] == list(range(1, 26))
