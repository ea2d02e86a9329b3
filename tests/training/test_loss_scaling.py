"""fp16's loss scaling, with torch's scaler on a CPU in float32: a skipped step is skipped everywhere; it resumes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import WordEncoder, log_entries, micro_config, trainer

from cascade.training.state import load_newest

FP16 = "training.precision=fp16"
KINDS = ("adamw", "adafactor", "muon")  # fused AdamW skips a step by itself, the others are not called


def scaled(output: Path, *changes: str, scale: float = 2.0**10, text: WordEncoder | None = None) -> Any:
    """A trainer with a scaler, as accelerate gives it one for fp16 on a GPU. The scale grows every third step."""
    run = trainer(micro_config(output, *changes), text)
    run.config = micro_config(output, *changes, FP16)  # after the refusal of fp16 on a CPU
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    run.accelerator.scaler = scaler
    run.optimizer.__setstate__({"scaler": scaler})
    run.accelerator.unscale_gradients = lambda: scaler.unscale_(run.optimizer.optimizer)
    return run


def overflowing(output: Path, *changes: str) -> Any:
    """A trainer whose first gradients overflow, with weights away from their average, which would follow them."""
    run = scaled(output, *changes, scale=2.0**127)
    with torch.no_grad():
        run.stage.network.head.bias += 1000
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_overflows_moves_neither_weights_nor_average(tmp_path: Path, kind: str) -> None:
    run = overflowing(tmp_path / "run", f"training.optimizer.kind={kind}")
    weights = {name: value.detach().clone() for name, value in run.stage.network.named_parameters()}
    average = {name: value.clone() for name, value in run.ema.weights.items()}
    run._step(1, run._batches(0))
    assert run.accelerator.scaler.get_scale() == 2.0**126, "it did not overflow"
    assert all(torch.equal(value, weights[name]) for name, value in run.stage.network.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.weights.items())
    assert "loss" in run.meter.sums
    assert "gradient_norm" not in run.meter.sums, "its norm is not finite, which JSON cannot say"


def test_a_run_whose_first_steps_overflow_writes_json(tmp_path: Path) -> None:
    assert overflowing(tmp_path / "run").run()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for path in [tmp_path / "run" / "log.jsonl", *(tmp_path / "run").rglob("*.json")]:
        text = path.read_text()
        for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(document, parse_constant=refuse)


def test_ten_scaled_steps_equal_five_and_a_resume_and_five(tmp_path: Path) -> None:
    changes = ("training.steps=10", "training.save_every=5", "training.optimizer.clip_norm=null")
    assert scaled(tmp_path / "whole", *changes).run()
    stop = WordEncoder(lambda call: signal.raise_signal(signal.SIGTERM) if call == 5 else None)
    assert not scaled(tmp_path / "halves", *changes, text=stop).run()
    assert scaled(tmp_path / "halves", *changes).run(resume=True)
    config = micro_config(tmp_path / "whole", *changes, FP16)
    a, b = (load_newest(tmp_path / name, config) for name in ("whole", "halves"))
    assert a.scaler["scale"] == 2.0**13  # three times three steps
    assert a.scaler == b.scaler
    for part in ("network", "ema", "optimizer"):
        assert all(torch.equal(value, getattr(b, part)[name]) for name, value in getattr(a, part).items()), part
    assert log_entries(tmp_path / "whole") == log_entries(tmp_path / "halves")
