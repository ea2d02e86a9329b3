"""The tiny cascade of configs/tiny: stages fit together, are small, and train unchanged."""

from itertools import pairwise
from pathlib import Path

import pytest

from cascade.resources.memory import count_parameters
from cascade.stage import build_stage
from cascade.storage.training import load_train_config, load_trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
NAMES = ("base", "sr", "sr2")


def test_the_tiny_stages_chain() -> None:
    stages = [load_train_config(CONFIGS / f"{name}.yaml").stage for name in NAMES]
    assert [stage.name for stage in stages] == list(NAMES)
    assert stages[0].low_resolution is None
    assert all(larger.low_resolution == smaller.resolution for smaller, larger in pairwise(stages))
    assert stages[-1].resolution == 64


@pytest.mark.parametrize("name", [*NAMES, "transformer"])
def test_a_tiny_stage_trains_as_it_stands(tmp_path: Path, name: str) -> None:
    changes = ["training.steps=2", "training.optimizer.warmup_steps=0", "training.sample_every=2"]
    config = load_train_config(CONFIGS / f"{name}.yaml", [f"output={tmp_path / name}", *changes])
    assert count_parameters(build_stage(config.stage, device="meta").network) < 600_000
    assert load_trainer(config).run()
    assert (tmp_path / name / "stage" / "model.safetensors").exists()
    assert (tmp_path / name / "samples" / "step-00000002.png").exists()
