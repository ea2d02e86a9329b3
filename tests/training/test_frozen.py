"""Frozen parts stay equal in bits, everything else is trained, and a misspelt name is reported."""

from pathlib import Path

import pytest
import torch
from helpers_training import micro_config, trainer

from cascade.errors import CascadeError
from cascade.files.tensors import load_tensors

# Decay moves even weights that get no gradient, if only the optimizer holds them.
DECAY = "training.optimizer.weight_decay=0.5"


def moved(tmp_path: Path, *frozen: str) -> dict[str, bool]:
    """Whether each weight changed in a run."""
    run = trainer(micro_config(tmp_path / "run", DECAY, f"training.frozen=[{', '.join(frozen)}]"))
    before = {name: value.detach().clone() for name, value in run.stage.network.named_parameters()}
    assert run.run()
    changes = {name: not _same(run, name, value) for name, value in before.items()}
    assert run.ema.weights.keys() == {name for name, change in changes.items() if change}
    finished = load_tensors(tmp_path / "run" / "stage" / "model.safetensors")
    assert all(torch.equal(finished[name], value) for name, value in before.items() if not changes[name])
    return changes


def _same(run: object, name: str, value: torch.Tensor) -> bool:
    return torch.equal(dict(run.stage.network.named_parameters())[name], value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("stem", lambda name: name.startswith("stem.")),  # nothing before the first norm learns
        ("levels.0", lambda name: name.startswith("levels.0.")),
        ("'*.attention'", lambda name: ".attention." in name),
        ("'*.bias'", lambda name: name.endswith(".bias")),
    ],
)
def test_chosen_parts_stay_frozen_and_the_rest_is_trained(tmp_path: Path, pattern: str, chosen: object) -> None:
    changes = moved(tmp_path, pattern)
    frozen = {name for name in changes if chosen(name)}  # type: ignore[operator]
    assert frozen
    assert {name for name, change in changes.items() if not change} == frozen


def test_a_pattern_that_matches_nothing_names_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"training\.frozen: 'level\.0' matches no weight; did you mean levels\.0"):
        trainer(micro_config(tmp_path / "run", "training.frozen=[level.0]"))
    with pytest.raises(CascadeError, match=r"'zzz' matches no weight; the parts are .*stem, levels"):
        trainer(micro_config(tmp_path / "run", "training.frozen=[zzz]"))


def test_a_run_that_could_learn_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="leaves nothing to train"):
        trainer(micro_config(tmp_path / "run", "training.frozen=['*']"))


def test_a_part_that_learns_only_after_a_resume_begins_its_average_with_itself(tmp_path: Path) -> None:
    assert trainer(micro_config(tmp_path / "run", "training.steps=2", "training.frozen=[stem]")).run()
    run = trainer(micro_config(tmp_path / "run"))
    run._restore()
    weights = dict(run.stage.network.named_parameters())
    assert torch.equal(run.ema.weights["stem.weight"], weights["stem.weight"])
    assert not torch.equal(run.ema.weights["head.weight"], weights["head.weight"])
    assert run.run(resume=True)
