"""accelerate's FSDP2 in two processes on a CPU, where accelerate itself would silently disable it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers_training import micro_config, trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def launcher_environment(name: str) -> dict[str, str]:
    """The environment set by `accelerate launch --config_file configs/accelerate/NAME.yaml` for each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return {key: str(value) for key, value in prepare_multi_gpu_env(arguments).items()}


def force_sharding(environment: dict[str, str]) -> None:
    """Make accelerate shard on a CPU as on GPUs: the same plugin, the same `fully_shard`, gloo instead of nccl."""
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    os.environ.update({key: value for key, value in environment.items() if "FSDP" in key})
    original = AcceleratorState.__init__

    def forced(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:  # accelerate's own parts look the state up without naming it
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = forced  # type: ignore[method-assign]


def train_sharded(
    rank: int, environment: dict[str, str], assignments: Sequence[str], output: str, resume: bool = False
) -> None:
    """Train under FSDP2, and record from inside which tensors were sharded."""
    force_sharding(environment)
    run = trainer(micro_config(Path(output), *assignments))
    assert run.run(resume=resume)
    network = run.stage.network
    states = run.optimizer.optimizer.state.values()
    memory = [value for state in states for name, value in state.items() if name != "step"]
    proof = {
        "processes": run.accelerator.num_processes,
        "units": sum(isinstance(module, FSDPModule) for module in network.modules()),
        "weights": all(isinstance(parameter, DTensor) for parameter in network.parameters()),
        "average": all(isinstance(value, DTensor) for value in run.ema.weights.values()),
        "memory": bool(memory) and all(isinstance(value, DTensor) for value in memory),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "here": sum(parameter.to_local().numel() for parameter in network.parameters()),
        "reads": str(run.accelerator.state.fsdp_plugin.mixed_precision_policy.param_dtype),
    }
    Path(f"{output}.{rank}.json").write_text(json.dumps(proof))


def refused_sharded(rank: int, environment: dict[str, str], assignments: Sequence[str], output: str) -> None:
    """Record the error with which a run under FSDP2 is refused."""
    from cascade.errors import CascadeError

    force_sharding(environment)
    try:
        trainer(micro_config(Path(output), *assignments))
    except CascadeError as error:
        Path(f"{output}.{rank}.txt").write_text(str(error))
