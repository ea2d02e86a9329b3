"""FSDP2: a run with sharded weights equals the run of one process, and its checkpoints hold whole weights.

accelerate silently disables its FSDP plugin on a CPU; `helpers_sharded` enables it, with accelerate's own preparation
and torch's `fully_shard` on a mesh of two gloo processes, and each test makes its assertions inside the processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from helpers_processes import finish, start
from helpers_sharded import CONFIGS, launcher_environment, refused_sharded, train_sharded
from helpers_training import TRANSFORMER, log_entries, micro_config, trainer

from cascade.files.tensors import load_tensors
from cascade.storage.stage import load_stage
from cascade.training.state import load_newest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the mesh of this test is one of CPU processes"),
]

LEARNING_RATE = 1e-2
CHANGES = (
    "training.steps=4",
    "training.save_every=2",
    "training.batch_size=8",
    "training.accumulation=2",
    "stage.model.channels=[8, 16]",
    "stage.model.blocks=[1, 1]",
    "stage.model.strides=[1, 2]",
    "stage.model.attention=[false, true]",
)
WATCHED = (
    "training.sample_every=2",
    "training.sample_prompts=[red]",
    "training.validation={sources: [{kind: scenes, held_out: true}], every: 2, batches: 1}",
)


def launch(output: Path, *changes: str, resume: bool = False, timeout_seconds: float = 300) -> dict[str, object]:
    """Train under FSDP2 in two processes, and give what the first saw, after both saw DTensors."""
    arguments = (launcher_environment("fsdp2"), changes, str(output), resume)
    assert finish(start(train_sharded, *arguments, processes=2), timeout_seconds) == [0, 0]
    proofs = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in (0, 1)]
    for proof in proofs:
        assert (proof["processes"], proof["weights"], proof["average"], proof["memory"]) == (2, True, True, True)
        assert proof["units"] > 1, "residual blocks are units beside the root"
    assert sum(proof["here"] for proof in proofs) == proofs[0]["parameters"], "each weight is in one process only"
    return proofs[0]


RUNS = {
    "adamw": (*CHANGES, "training.optimizer.kind=adamw"),
    "adafactor": (*CHANGES, "training.optimizer.kind=adafactor"),
    "transformer": (*CHANGES[:4], *TRANSFORMER, "training.activation_checkpointing=true"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_run_is_that_of_one_process_and_its_checkpoint_loads_there(tmp_path: Path, kind: str) -> None:
    changes = (*RUNS[kind], *WATCHED)
    one = micro_config(tmp_path / "one", *changes)
    assert trainer(one).run()
    launch(tmp_path / "two", *changes)
    for entry, other in zip(log_entries(tmp_path / "one"), log_entries(tmp_path / "two"), strict=True):
        assert other == pytest.approx(entry, rel=1e-3)  # the loss and its bands, norms, validation
    a, b = load_newest(tmp_path / "one", one), load_newest(tmp_path / "two", one)
    for part in ("network", "ema", "optimizer"):
        whole, sharded = getattr(a, part), getattr(b, part)
        assert {name: tensor.shape for name, tensor in sharded.items()} == {n: t.shape for n, t in whole.items()}
    for name, weights in a.network.items():
        # Adam divides a small gradient by its own size: a few per cent of the steps taken bear that.
        torch.testing.assert_close(b.network[name], weights, rtol=0, atol=0.1 * LEARNING_RATE, msg=name)
    assert (tmp_path / "two" / "samples" / "step-00000004.png").exists()
    weights = dict(load_stage(tmp_path / "two" / "stage").network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in b.ema.items())


def test_a_run_goes_from_two_sharded_processes_to_one_and_back(tmp_path: Path) -> None:
    """2 steps sharded, 2 in one process, 2 sharded: every continuation starts from the bits that were saved."""
    run = tmp_path / "run"
    launch(run, *CHANGES, "training.steps=2")
    saved = load_newest(run, micro_config(run, *CHANGES, "training.steps=2"))
    alone = trainer(micro_config(run, *CHANGES))
    alone._restore()
    for part, tensors in (("network", dict(alone.stage.network.named_parameters())), ("ema", alone.ema.weights)):
        assert all(torch.equal(tensors[name], value) for name, value in getattr(saved, part).items()), part
    assert alone.run(resume=True)
    launch(run, *CHANGES, "training.steps=6", resume=True)
    launch(tmp_path / "straight", *CHANGES, "training.steps=6")
    for entry, other in zip(log_entries(run), log_entries(tmp_path / "straight"), strict=True):
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-2)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_sharded_run_resumes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    changes = (*CHANGES, f"training.optimizer.kind={kind}")
    launch(tmp_path / "whole", *changes)
    launch(tmp_path / "halves", *changes)
    (tmp_path / "halves" / "checkpoints" / "step-00000004").rename(tmp_path / "lost")
    launch(tmp_path / "halves", *changes, resume=True)
    config = micro_config(tmp_path / "whole", *changes)
    a, b = load_newest(tmp_path / "whole", config), load_newest(tmp_path / "halves", config)
    for part in ("network", "ema", "optimizer"):
        tensors, others = getattr(a, part), getattr(b, part)
        assert all(torch.equal(tensors[name], others[name]) for name in tensors), part
    assert log_entries(tmp_path / "whole") == log_entries(tmp_path / "halves")


def test_bf16_reaches_the_blocks_and_the_weights_stay_float32(tmp_path: Path) -> None:
    assert launch(tmp_path / "run", *CHANGES, "training.precision=bf16")["reads"] == "torch.bfloat16"
    state = load_newest(tmp_path / "run", micro_config(tmp_path / "run", *CHANGES, "training.precision=bf16"))
    assert {tensor.dtype for tensor in (*state.network.values(), *state.ema.values())} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [("training.optimizer.kind=muon", "muon needs whole weights"), ("training.lora_rank=2", "must be 0 under FSDP")],
)
def test_settings_that_need_whole_weights_are_refused(tmp_path: Path, change: str, message: str) -> None:
    output = tmp_path / "run"
    arguments = (launcher_environment("fsdp2"), (*CHANGES, change), str(output))
    assert finish(start(refused_sharded, *arguments, processes=2)) == [0, 0]
    assert all(message in Path(f"{output}.{rank}.txt").read_text() for rank in (0, 1))


LARGE = (
    "training.steps=1",
    "training.batch_size=2",
    "stage.model.channels=[256, 1536]",
    "stage.model.blocks=[1, 2]",
    "stage.model.strides=[1, 2]",
    "stage.model.attention=[false, true]",
    "stage.model.head_dim=64",
    "stage.model.groups=32",
    "stage.model.embedding_dim=512",
    "training.keep_checkpoints=1",
)


@pytest.mark.skipif(psutil.virtual_memory().available < 14e9, reason="two processes of 5 GB and a checkpoint of 5 GB")
def test_a_network_of_three_hundred_million_weights_takes_a_step_and_is_saved_whole(tmp_path: Path) -> None:
    proof = launch(tmp_path / "run", *LARGE, timeout_seconds=900)
    assert proof["parameters"] >= 300_000_000  # type: ignore[operator]
    tensors = load_tensors(tmp_path / "run" / "stage" / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == proof["parameters"]
    weights = dict(load_stage(tmp_path / "run" / "stage").network.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_accelerate_reads_every_launcher_configuration(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(CONFIGS / f"{name}.yaml")
    assert config.num_processes == 8 * config.num_machines
    environment = launcher_environment(name)
    if "fsdp" in name:
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in environment, "the network names its units itself"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    else:
        assert "ACCELERATE_USE_FSDP" not in environment
