"""Setup of accelerate (one process or many, DDP or FSDP2), a run's precision, and checks in every step."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from cascade.config.training import TrainConfig, TrainingConfig
from cascade.errors import CascadeError, ShortageError
from cascade.models.network import Network
from cascade.resources.number_format import Work, faster_format, warn_if_slow
from cascade.settings import read_yaml
from cascade.system.device import has_bfloat16, is_out_of_memory, name_of
from cascade.training.optim import build_optimizer
from cascade.training.state import checkpoints
from cascade.training.weights import add_low_rank, freeze

ResultT = TypeVar("ResultT")
TIMEOUT = timedelta(hours=2)
"""Time-out for processes that wait for each other: longer than the main process needs to write a checkpoint of the
largest preset to a slow disk. torch's default is 10 minutes on GPUs. The launcher notices a dead process at once."""
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run. Raises CascadeError for a precision or a tracker that is not available."""
    precision = config.training.precision
    trackers = list(config.training.trackers)
    device = launched_processes().device
    assert precision != "auto", "settled before"
    if precision == "bf16" and device.type == "mps" and not has_bfloat16(device):  # NVIDIA's older GPUs emulate it
        raise CascadeError(f"training.precision: {name_of(device)} has no bfloat16; use fp16 or fp32")
    if precision == "fp16" and device.type == "cpu":
        raise CascadeError("training.precision: fp16 needs a GPU; on a CPU use bf16")
    # Shared by all accelerators of a process; it would refuse another precision than an earlier run's.
    AcceleratorState._reset_state()
    plugin = sharding_plugin(_DTYPES[precision]) if _asks_for_sharding() else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`log_with=")  # the error below reports it
            accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision="no" if precision == "fp32" else precision,
                log_with=trackers or None,
                project_dir=config.output,
                fsdp_plugin=plugin,
            )
    except ValueError as error:
        raise CascadeError(f"training.trackers: {error}") from None
    if "all" not in trackers and len(accelerator.log_with) < len(set(trackers)):  # accelerate drops others silently
        found = {str(tracker) for tracker in accelerator.log_with}
        missing = [tracker for tracker in trackers if tracker not in found]
        how = "pip install 'cascade-diffusion[tensorboard]'" if missing == ["tensorboard"] else "install it"
        raise CascadeError(f"training.trackers: {', '.join(missing)} is not installed; {how}, or leave it out")
    return accelerator


def start_trackers(accelerator: Accelerator, name: str, first_step: int) -> None:
    """Start the trackers; TensorBoard hides values from `first_step` on that a killed run sent."""
    if accelerator.log_with:
        accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": first_step}})


def sharding_plugin(dtype: torch.dtype | None) -> FullyShardedDataParallelPlugin:
    """The FSDP2 settings of accelerate's launcher, with our own mixed precision.

    accelerate's would round log SNR to bfloat16 at the input, and sum gradients in bfloat16.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise CascadeError("accelerate's configuration: only FSDP2 is supported; set fsdp_version: 2")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy, fsdp_version=2)
    if plugin.activation_checkpointing:
        raise CascadeError(
            "fsdp_activation_checkpointing: leave it out, and set training.activation_checkpointing=true"
        )
    return plugin


def shards(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of every weight."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def check_shardable(settings: TrainingConfig) -> None:
    """Raise CascadeError for settings that need whole weights."""
    if settings.optimizer.kind in ("muon", "prodigy", "schedule_free"):
        raise CascadeError(
            f"training.optimizer.kind: {settings.optimizer.kind} needs whole weights, and FSDP gives each process a"
            " part; use adamw or adafactor, or start without FSDP"
        )
    if settings.lora_rank:
        raise CascadeError(
            "training.lora_rank: must be 0 under FSDP; use DDP, for which low-rank differences are small enough"
        )


def from_main(accelerator: Accelerator | PartialState, action: Callable[[], ResultT]) -> ResultT:
    """Run `action` on the main process only and return its result in every process.

    An exception ends every process, the others with a CascadeError; otherwise they would wait until their time-out.
    The action must not communicate with other processes, and its result must be small and plain.
    """
    if accelerator.num_processes == 1:
        return action()
    answer: list[object] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except Exception as error:
            failure, answer[1] = error, _failure_message(error)
    torch.distributed.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise CascadeError(str(answer[1]))
    return answer[0]  # type: ignore[return-value]


def _failure_message(error: Exception) -> str:
    """The message in the other processes about an error in the main one."""
    if isinstance(error, CascadeError):
        return str(error)
    reason = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"the main process failed with {type(error).__name__}: {reason}; see its own output"


def launched_processes() -> PartialState:
    """accelerate's state of the processes that were launched together; the first call decides it.

    On a machine without GPUs accelerate treats each of several processes as a single one unless the CPU is requested:
    by `ACCELERATE_USE_CPU`, which torchrun does not set, or here. Raises CascadeError when accelerate's number of
    processes differs from the launched one: each would be a separate run.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
    launched = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if state.num_processes < launched and state.device.type in ("cpu", "mps"):
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=TIMEOUT)
    if state.num_processes != launched:
        raise CascadeError(
            f"{launched} processes were launched, but accelerate found {state.num_processes} of them; start them with"
            " `accelerate launch` or torchrun"
        )
    return state


def expected_processes() -> tuple[int, bool]:
    """The number of launched processes, and whether they will shard the weights."""
    state = launched_processes()
    return int(state.num_processes), _asks_for_sharding() and state.device.type != "cpu"


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process; every process must call this."""
    if accelerator.num_processes == 1:
        return flag
    told = torch.tensor(float(flag))
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, _cpu_group(accelerator.device))
    return bool(told > 0)


@cache
def _cpu_group(device: torch.device) -> torch.distributed.ProcessGroup | None:
    """A CPU process group next to the GPUs', so that communication does not wait for queued GPU work.

    None, the default group, where the processes compute on CPUs.
    """
    return None if device.type == "cpu" else torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)


def _asks_for_sharding() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def prepared(accelerator: Accelerator, network: Network, settings: TrainingConfig) -> tuple[nn.Module, Any]:
    """The network and its optimizer, wrapped by accelerate."""
    network.activation_checkpointing = settings.activation_checkpointing
    if settings.lora_rank:
        add_low_rank(network, settings.lora_rank, settings.lora_layers, settings.seed, settings.lora_kind)
    freeze(network, settings.frozen, settings.trained)
    if shards(accelerator):
        check_shardable(settings)
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # required by FSDP
    else:
        network.to(accelerator.device)  # before the optimizer, which may hold views of the weights
    compiled = torch.compile(network) if settings.compile else network
    optimizer = build_optimizer(network, settings.optimizer)
    wrapped: tuple[nn.Module, Any] = accelerator.prepare(compiled, optimizer)
    return wrapped


# --- guards ----------------------------------------------------------------------------------------------------------
# Checks in every step that stop a run with a one-line error before it saves a bad checkpoint.


def check_batch(pass_size: int, accelerator: Accelerator) -> None:
    """Raise CascadeError unless the pictures of a pass divide evenly among the processes."""
    processes = accelerator.num_processes
    if pass_size % processes:
        raise CascadeError(
            f"training.batch_size / training.accumulation = {pass_size} does not divide among {processes} processes;"
            f" make it a multiple of {processes}, or start another number of processes"
        )


class Views(Protocol):
    """View numbers and captions of a batch."""

    @property
    def samples(self) -> Sequence[int]:
        """The view numbers in the run."""

    @property
    def captions(self) -> Sequence[str]:
        """The captions, in the same order."""


def check_finite(loss: Tensor, step: int, batch: Views, accelerator: Accelerator) -> None:
    """Raise CascadeError in every process when a loss (B,) is not finite in any; each names its own views."""
    finite = torch.isfinite(loss).flatten()
    # Every process must stop, not only the one with the bad loss, or the others wait forever.
    if any_process(accelerator, not bool(finite.all())):
        bad = [sample for sample, ok in zip(batch.samples, finite.tolist(), strict=True) if not ok]
        captions = [caption for caption, ok in zip(batch.captions, finite.tolist(), strict=True) if not ok]
        where = f"views {bad} ({captions[:3]})" if bad else "in another process, which names the views"
        raise CascadeError(
            f"the loss is not finite at step {step}, {where}; the last checkpoint is intact."
            " Lower training.optimizer.learning_rate, or use training.precision=fp32"
        )


def check_gradient(norm: float, step: int, precision: str) -> None:
    """Raise CascadeError for a gradient that is not finite, before weights changed by it are saved.

    fp16's loss scaling skips such steps by itself.
    """
    if not math.isfinite(norm) and precision != "fp16":
        raise CascadeError(
            f"the gradient is not finite at step {step}, though the loss is; the last checkpoint is intact."
            " Lower training.optimizer.learning_rate, or use training.precision=fp32"
        )


_SMALLER_STEPS = (
    "raise training.accumulation, which gives the same steps in smaller passes, or set"
    " training.activation_checkpointing=true; the last checkpoint is intact"
)


@contextmanager
def shortage_as_error(when: str = "in training", way_out: str = _SMALLER_STEPS) -> Iterator[None]:
    """Turn an out-of-memory error into a ShortageError with a way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ShortageError(f"out of memory {when} ({_first_line(error)}); {way_out}") from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- precision -------------------------------------------------------------------------------------------------------
# The precision of a run whose settings say `auto`.

logger = logging.getLogger("cascade.training")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def settled(config: TrainConfig) -> TrainConfig:
    """The settings with `auto` replaced by the precision that the run began with, or the fastest on this machine.

    An explicit precision stays; if it is slow, a line reports how slow. All processes together.
    """
    state = launched_processes()
    training = config.training
    if training.precision != "auto":
        refused = training.precision == "fp16" and state.device.type == "cpu"  # the accelerator will refuse it
        if state.is_main_process and training.precision != "fp32" and not refused:
            warn_if_slow([_work(config)], state.device, DTYPES[training.precision])
        return config
    chosen = from_main(state, lambda: _begun_in(config) or _NAMES[faster_format([_work(config)], state.device)])
    return config.model_copy(update={"training": training.model_copy(update={"precision": chosen})})


def _begun_in(config: TrainConfig) -> str | None:
    """The precision of the run in the output folder, if there is one."""
    folder = Path(config.output)
    if not checkpoints(folder):
        return None
    known = read_yaml(folder / "config.yaml").get("training", {}).get("precision", "fp32")
    return None if known == "auto" else str(known)


def _work(config: TrainConfig) -> Work:
    training = config.training
    pictures = max(1, training.batch_size // training.accumulation // launched_processes().num_processes)
    return Work(config.stage, pictures, trained=True)
