"""A run that stops and resumes equals an uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_training import TRANSFORMER, WordEncoder, log_entries, micro_config, trainer, write_pictures
from PIL import Image

from cascade.config.training import TrainConfig
from cascade.data.loader import View, Views
from cascade.errors import CascadeError
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import CachedTextEncoder, fill
from cascade.training.state import RunState, load_newest

TESTS = Path(__file__).parents[1]
# Two levels with strides and 3x3 kernels, so that layouts in memory matter as they do in real networks.
TWO_LEVELS = (
    "stage.model.channels=[8, 16]",
    "stage.model.blocks=[1, 1]",
    "stage.model.strides=[1, 2]",
    "stage.model.attention=[false, true]",
)
CASES = {
    "adamw": TWO_LEVELS,
    "adafactor": (*TWO_LEVELS, "training.optimizer.kind=adafactor"),
    "muon": (*TWO_LEVELS, "training.optimizer.kind=muon"),
    "dropout": (*TWO_LEVELS, "stage.model.dropout=0.5"),
    "accumulation": ("training.accumulation=2", "training.loss.stratified=true"),
    "decay": ("training.optimizer.decay=cosine", "training.optimizer.warmup_steps=3"),
    "bf16": ("training.precision=bf16",),
    "transformer": TRANSFORMER,
    "transformer and muon": (*TRANSFORMER, "training.optimizer.kind=muon"),
    "between log entries": ("training.log_every=3",),
}


def config_of(output: Path, steps: int, *changes: str) -> TrainConfig:
    return micro_config(output, f"training.steps={steps}", "training.save_every=5", *changes)


def train(config: TrainConfig, text: WordEncoder | None = None, resume: bool = False) -> bool:
    return trainer(config, text).run(resume)


def stop_at(call: int, number: signal.Signals = signal.SIGTERM) -> WordEncoder:
    """An encoder during whose n-th call the process receives a signal."""
    return WordEncoder(lambda calls: signal.raise_signal(number) if calls == call else None)


def state_of(config: TrainConfig) -> RunState:
    return load_newest(Path(config.output), config)


def assert_same_run(one: TrainConfig, other: TrainConfig, log: bool = True) -> None:
    """Step, network, EMA, optimizer and log are the same in bits."""
    a, b = state_of(one), state_of(other)
    assert a.step == b.step
    for part in ("network", "ema", "optimizer"):
        tensors, others = getattr(a, part), getattr(b, part)
        assert tensors.keys() == others.keys()
        assert not [name for name in tensors if not torch.equal(tensors[name], others[name])], part
    assert a.optimizer, "an empty optimizer state proves nothing"
    if log:
        assert log_entries(Path(one.output)) == log_entries(Path(other.output))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_ten_steps_equal_five_and_a_resume_and_five(tmp_path: Path, changes: tuple[str, ...]) -> None:
    whole, halves = (config_of(tmp_path / name, 10, *changes) for name in ("whole", "halves"))
    assert train(whole)
    calls_per_step = halves.training.accumulation
    assert not train(halves, stop_at(5 * calls_per_step))
    assert state_of(halves).step == 5
    assert train(halves, resume=True)
    assert_same_run(whole, halves)


def test_a_text_cache_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With a cache that knows every other caption, the rest is encoded when met."""
    captions = [f"picture {index}" for index in range(6)]
    pictures = {caption: Image.new("RGB", (8, 8), (40 * i, 0, 99)) for i, caption in enumerate(captions)}
    folder = write_pictures(tmp_path / "pictures", pictures)
    fill(EmbeddingCache(tmp_path / "cache", WordEncoder.fingerprint, WordEncoder.dim), WordEncoder(), captions[::2])

    def cached(inner: WordEncoder) -> CachedTextEncoder:
        return CachedTextEncoder(EmbeddingCache(tmp_path / "cache", inner.fingerprint, inner.dim), lambda: inner)

    whole, halves = (
        config_of(tmp_path / name, 10, f"data.sources=[{{kind: folder, path: {folder}}}]")
        for name in ("whole", "halves")
    )
    assert trainer(whole, cached(WordEncoder())).run()
    assert not trainer(halves, cached(stop_at(5))).run()
    assert 5 <= state_of(halves).step < 10
    assert trainer(halves, cached(WordEncoder())).run(resume=True)
    assert_same_run(whole, halves)


@pytest.mark.slow
def test_worker_processes_resume_bit_for_bit_and_change_nothing(tmp_path: Path) -> None:
    changes = ("data.workers=1", "stage.model.dropout=0.3")  # starting a worker draws from the generator of dropout
    whole, halves, alone = (config_of(tmp_path / name, 10, *changes) for name in ("whole", "halves", "alone"))
    alone = alone.model_copy(update={"data": alone.data.model_copy(update={"workers": 0})})
    assert train(whole)
    assert train(alone)
    assert not train(halves, stop_at(5))
    assert train(halves, resume=True)
    assert_same_run(whole, halves)
    assert_same_run(whole, alone)


def test_a_run_whose_reader_is_killed_saves_and_resumes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_pictures(tmp_path / "data", {"a fox": Image.new("RGB", (8, 8))})
    changes = ("data.workers=2", f"data.sources=[{{kind: folder, path: {pictures}}}]")
    whole, killed = (config_of(tmp_path / name, 10, *changes) for name in ("whole", "killed"))
    assert train(whole)
    real = Views.__getitem__
    fatal = 7 * whole.training.batch_size  # of step 8

    def kill(self: Views, sample: int) -> View:
        if sample == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, sample)

    monkeypatch.setattr(Views, "__getitem__", kill)
    with pytest.raises(CascadeError, match=r"^a process that reads .* step \d is saved, --resume continues from it$"):
        train(killed)
    monkeypatch.undo()
    assert 5 <= state_of(killed).step <= 7  # readers are ahead of the training
    assert train(killed, resume=True)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_checkpoints_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    whole, stopped = (config_of(tmp_path / name, 6) for name in ("whole", "stopped"))
    assert train(whole)
    before = signal.getsignal(number)
    assert not train(stopped, stop_at(3, number))
    assert signal.getsignal(number) == before
    assert state_of(stopped).step == 3
    assert train(stopped, resume=True)
    assert_same_run(whole, stopped)


WATCHED = (
    "training.log_every=5",
    "training.sample_every=5",
    "training.sample_prompts=[red]",
    "training.validation={sources: [{kind: scenes, held_out: true}], every: 5, batches: 1}",
)


def test_a_stop_leaves_validation_and_grid_to_the_resumed_run_which_ends_as_one_that_was_not_stopped(
    tmp_path: Path,
) -> None:
    """Also when the resumed run ends before its first checkpoint, and has to make them once more."""
    whole, stopped = (config_of(tmp_path / name, 10, *WATCHED) for name in ("whole", "stopped"))
    assert train(whole)
    encoder = stop_at(5)
    assert not train(stopped, encoder)
    assert encoder.calls == 5, "nothing is encoded after the step"
    assert state_of(stopped).step == 5
    assert not log_entries(Path(stopped.output))

    def fail(call: int) -> None:
        if call == 5:  # the validation, two for the grid, a step
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(stopped, WordEncoder(fail), resume=True)
    assert [entry["step"] for entry in log_entries(Path(stopped.output))] == [5]
    assert train(stopped, resume=True)
    assert_same_run(whole, stopped)
    for name in ("samples/step-00000005.png", "samples/step-00000010.png", "stage/model.safetensors"):
        assert Path(stopped.output, name).read_bytes() == Path(whole.output, name).read_bytes()


@pytest.mark.parametrize(("call", "calls"), [(6, 6), (7, 8), (8, 8)], ids=["validation", "its end", "grid"])
def test_a_stop_within_a_validation_or_a_grid_leaves_it_to_the_resumed_run(
    tmp_path: Path, call: int, calls: int
) -> None:
    """Two batches of validation, the 6th and 7th encoding; the grid's texts, the 8th."""
    watched = [change.replace("batches: 1", "batches: 2") for change in WATCHED]
    whole, stopped = (config_of(tmp_path / name, 10, *watched) for name in ("whole", "stopped"))
    assert train(whole)
    encoder = stop_at(call)
    assert not train(stopped, encoder)
    assert encoder.calls == calls, "the rest was not done"
    assert state_of(stopped).step == 5
    assert not log_entries(Path(stopped.output))
    assert not train(stopped, stop_at(call - 5), resume=True), "nor in the resumed run, which is stopped there again"
    assert state_of(stopped).step == 5
    assert not log_entries(Path(stopped.output))
    assert train(stopped, resume=True)
    assert_same_run(whole, stopped)
    for name in ("samples/step-00000005.png", "samples/step-00000010.png"):
        assert Path(stopped.output, name).read_bytes() == Path(whole.output, name).read_bytes()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(calls: int) -> None:
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(tmp_path / "run", 6), WordEncoder(twice))


SLOW_RUN = """
import sys
from pathlib import Path
from helpers_training import WordEncoder, micro_config, trainer
config = micro_config(Path(sys.argv[1]), "training.steps=40", "training.save_every=1000", *sys.argv[2:])
sys.exit(0 if trainer(config, WordEncoder(delay_seconds=0.1)).run() else 7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_processes_are_all_asked_to_stop_saves_and_resumes_to_the_same_weights(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    whole, stopped = (
        micro_config(tmp_path / name, "training.steps=40", "training.save_every=1000") for name in ("whole", "stopped")
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-c", SLOW_RUN, stopped.output, f"data.workers={workers}"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_for(Path(stopped.output) / "log.jsonl", process)
        assert len(psutil.Process(process.pid).children()) >= workers
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 7
    finally:
        process.kill()
    assert 1 <= state_of(stopped).step < 40
    assert train(whole)
    assert train(stopped, resume=True)
    assert_same_run(whole, stopped)


def wait_for(log: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until the log has a line; each of the 40 steps takes at least a tenth of a second."""
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, "the run ended before its first step"
        time.sleep(0.02)


def write_shapes(folder: Path) -> Path:
    """Pictures of three shapes, with captions."""
    folder.mkdir()
    for number in range(24):
        size = ((8, 8), (16, 8), (8, 16))[number % 3]
        Image.new("RGB", size, (10 * number, 90, 200)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


def test_a_run_of_pictures_in_buckets_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = (
        f"data.sources=[{{kind: folder, path: {write_shapes(tmp_path / 'pictures')}}}]",
        "data.buckets=[1, 2, 0.5]",
        "training.accumulation=2",
    )
    whole = config_of(tmp_path / "whole", 10, *changes)
    assert train(whole)
    parts = config_of(tmp_path / "parts", 5, *changes)
    assert train(parts)
    parts = config_of(tmp_path / "parts", 10, *changes)
    assert train(parts, resume=True)
    assert_same_run(whole, parts)
    squares = config_of(tmp_path / "squares", 10, *changes[:1], changes[2])
    assert train(squares)
    with pytest.raises(AssertionError):
        assert_same_run(whole, squares)
