"""accelerate, as this project uses it: one process or many, replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from cascade.config.training import TrainConfig, TrainingConfig
from cascade.errors import CascadeError
from cascade.machine import has_bfloat16, name_of

ResultT = TypeVar("ResultT")
TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other: longer than the main one needs to write a checkpoint of the largest preset to
a slow disk. torch's own is 10 minutes on GPUs. That one has ended is noticed at once, by whoever started them."""
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run. Raises CascadeError for a precision or a tracker that is not to be had here."""
    precision = config.training.precision
    trackers = list(config.training.trackers)
    device = launched_processes().device
    assert precision != "auto", "settled before"
    if precision == "bf16" and device.type == "mps" and not has_bfloat16(device):  # NVIDIA's older GPUs imitate it
        raise CascadeError(f"training.precision: {name_of(device)} has no bfloat16; use fp16 or fp32")
    if precision == "fp16" and device.type == "cpu":
        raise CascadeError("training.precision: fp16 needs a GPU; on a CPU use bf16")
    # It is shared by all accelerators of a process, and refuses another precision than the run before had.
    AcceleratorState._reset_state()
    plugin = sharding_plugin(_DTYPES[precision]) if _asks_for_sharding() else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=")  # the error below says it
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="no" if precision == "fp32" else precision,
                log_with=trackers or None,
                project_dir=config.output,
                fsdp_plugin=plugin,
            )
    except ValueError as error:
        raise CascadeError(f"training.trackers: {error}") from None
    if "all" not in trackers and len(accelerator.log_with) < len(set(trackers)):  # accelerate leaves them out silently
        found = {str(tracker) for tracker in accelerator.log_with}
        missing = [tracker for tracker in trackers if tracker not in found]
        how = "pip install 'cascade-diffusion[tensorboard]'" if missing == ["tensorboard"] else "install it"
        raise CascadeError(f"training.trackers: {', '.join(missing)} is not installed; {how}, or leave it out")
    return accelerator


def start_trackers(accelerator: Accelerator, name: str, first_step: int) -> None:
    """Begin to send a run's numbers; TensorBoard hides those that a killed run sent from `first_step` on."""
    if accelerator.log_with:
        accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": first_step}})


def sharding_plugin(dtype: torch.dtype | None) -> FullyShardedDataParallelPlugin:
    """accelerate's settings of FSDP2, as its launcher gave them, with a mixed precision that is ours.

    accelerate's own would round log SNR to bfloat16 on its way in, and sum gradients in bfloat16.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise CascadeError("accelerate's configuration: weights are sharded by FSDP2 only; set fsdp_version: 2")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy, fsdp_version=2)
    if plugin.activation_checkpointing:
        raise CascadeError(
            "fsdp_activation_checkpointing: leave it out, and set training.activation_checkpointing=true"
        )
    return plugin


def shards(accelerator: Accelerator) -> bool:
    """Whether each process will hold a part of every weight."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def check_shardable(settings: TrainingConfig) -> None:
    """Raises CascadeError for settings whose arithmetic needs whole weights."""
    if settings.optimizer.kind == "muon":
        raise CascadeError(
            "training.optimizer.kind: muon needs whole weights, and FSDP gives each process a part; use adamw or"
            " adafactor, or start without FSDP"
        )
    if settings.lora_rank:
        raise CascadeError(
            "training.lora_rank: leave it 0 under FSDP; differences of low rank are small enough for DDP"
        )


def from_main(accelerator: Accelerator | PartialState, action: Callable[[], ResultT]) -> ResultT:
    """Run `action` on the main process alone; its result in every process, which wait for it.

    What it raises ends every process, the others with a CascadeError: were they not told, they would wait until their
    time-out. The action must not talk to other processes, and its result must be small and plain.
    """
    if accelerator.num_processes == 1:
        return action()
    answer: list[object] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except Exception as error:
            failure, answer[1] = error, _told(error)
    torch.distributed.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise CascadeError(str(answer[1]))
    return answer[0]  # type: ignore[return-value]


def _told(error: Exception) -> str:
    """What the other processes say of an error in the main one."""
    if isinstance(error, CascadeError):
        return str(error)
    reason = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"the main process failed with {type(error).__name__}: {reason}; what it wrote says where"


def launched_processes() -> PartialState:
    """The processes that were launched together, as accelerate sees them, which keeps what it was told first.

    On a machine without GPUs accelerate takes each of several processes for one alone, unless it is told that the CPU
    is meant: by `ACCELERATE_USE_CPU`, which torchrun does not know, or here. Raises CascadeError when it sees another
    number than was launched: each would be a run of its own.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    launched = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if state.num_processes < launched and state.device.type in ("cpu", "mps"):
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=TIMEOUT)
    if state.num_processes != launched:
        raise CascadeError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes} of them; start them with"
            " `accelerate launch` or torchrun"
        )
    return state


def expected_processes() -> tuple[int, bool]:
    """How many processes were launched, and whether they will share out the weights."""
    state = launched_processes()
    return int(state.num_processes), _asks_for_sharding() and state.device.type != "cpu"


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process; every process must ask."""
    if accelerator.num_processes == 1:
        return flag
    told = torch.tensor(float(flag))
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, _beside_gpus(accelerator.device))
    return bool(told > 0)


@cache
def _beside_gpus(device: torch.device) -> torch.distributed.ProcessGroup | None:
    """All processes, for what they tell each other without their GPUs: nobody waits for what these still have to do.

    None is the group that there is, which serves CPUs where the processes compute on them.
    """
    return None if device.type == "cpu" else torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


def _asks_for_sharding() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
