"""Checks that need a GPU, each in a separate process, with one table of results; started by check_gpu.sh.

Checks of results run in parallel, then those that measure time run alone. A check that crashes, hangs or fails is a row
of the table and does not stop the others; the table names the file with its output.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
PROMPT = "a red apple, noto style"
RESULT = "check_gpu result: "
"""Prefix of the lines in a check's output that are rows of the table."""
DATASHEETS = {"H200": 989e3, "H100 PCIe": 756e3, "H100": 989e3, "A100": 312e3, "L40S": 362e3, "L4": 121e3, "A10": 125e3}
"""NVIDIA's dense 16-bit GFLOP/s, by a part of the GPU's name; the first match counts."""
DEVICE_TESTS = ("tests/test_devices.py", "tests/test_memory.py", "tests/test_stage.py", "tests/test_conditioning.py")
"""Fast tests of computation on a device."""


@dataclass(frozen=True)
class Row:
    """A line of the table. ok: None where there was nothing to check."""

    name: str
    ok: bool | None
    said: str


Check = Callable[[torch.device], list[Row]]


def pytest_rows(device: torch.device) -> list[Row]:
    """The fast tests that touch a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *DEVICE_TESTS]
    if device.type == "cpu":
        command += ["-k", "refuses"]  # the rest runs in the test suite anyway
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-5000:], done.stderr[-2000:])
    lines = done.stdout.strip().splitlines() or ["no output"]
    return [Row("fast tests", done.returncode == 0, lines[-1].strip("= "))]


def exact_arithmetic() -> None:
    """Disable TF32, so that a GPU's convolutions use all bits of float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def parity_rows(device: torch.device) -> list[Row]:
    """One call of every network of the bundled cascade, and IF's, on CPU and GPU; a training step's gradient."""
    exact_arithmetic()
    errors = {
        dtype: {name: network_error(name, device, dtype) for name in ("base", "sr256", "sr1024", "if")}
        for dtype in (torch.float32, torch.bfloat16)
    }
    gradient = gradient_error(device)
    exact, half = errors[torch.float32], errors[torch.bfloat16]
    return [
        Row("networks, fp32, as on a CPU", max(exact.values()) < 1e-4, listed(exact, "at most 1e-4")),
        Row("networks, bf16", max(half.values()) < 0.1, listed(half, "stated, not set")),
        Row("gradient, fp32", gradient < 1e-3, f"{gradient:.1e} of its norm, at most 1e-3"),
    ]


def listed(errors: Mapping[str, float], limit: str) -> str:
    """Largest difference of each network, as a share of its output's largest number."""
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + f"; {limit}"


def network_error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of a network's x_hat on `device` in `dtype` from that on the CPU in float32, as a share."""
    stage = some_stage(name)
    z, log_snr = noise(1, 3, 64, 64), torch.zeros(1, 1, 1, 1)
    cond = some_conditions(stage.config, 64)
    with torch.inference_mode():
        expected = first(stage.prepare(cond)(z, log_snr))
        stage.to(device, dtype)
        answer = first(stage.prepare(cond.to(device))(z.to(device), log_snr.to(device))).float().cpu()
    return float((answer - expected).abs().max() / expected.abs().max())


def gradient_error(device: torch.device) -> float:
    """Distance of a loss's gradient on `device` from that on the CPU, as a share of its norm."""
    gradients = []
    for place in (torch.device("cpu"), device):
        stage = some_stage("base").to(place)
        stage.network.requires_grad_(True)
        z, log_snr, cond = noise(1, 3, 64, 64), torch.zeros(1, 1, 1, 1), some_conditions(stage.config, 64)
        stage.network(z.to(place), log_snr.to(place), cond.to(place)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in stage.network.parameters() if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def some_stage(name: str) -> Any:
    """A stage of the bundled cascade, or one with IF's network, small, and random weights."""
    from cascade.config.stage import SquaredCosineSchedule, StageConfig
    from cascade.models.if_unet import IFUNetConfig
    from cascade.stage import build_stage
    from cascade.storage.index import find_stage
    from cascade.storage.stage import load_stage

    if name != "if":
        return load_stage(find_stage(f"bundled/{name}"))
    model = IFUNetConfig(
        channels=(32, 64), blocks=(1, 1), attention=(False, True), embedding_dim=128, text_dim=64, head_dim=16
    ).model_copy(update={"context_dim": 32, "pooling_heads": 4})
    stage = build_stage(StageConfig(name="base", resolution=64, schedule=SquaredCosineSchedule(), model=model))
    stage.network.eval().requires_grad_(False)
    return stage


def some_conditions(config: Any, size: int) -> Any:
    """Random text, and a random smaller picture where the stage has one."""
    from cascade.conditioning import Conditioning

    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[:, 12:] = False
    cond = Conditioning(noise(1, 16, config.model.text_dim), mask)
    if config.low_resolution is None:
        return cond
    low = size // config.scale
    return replace(cond, low_res=noise(1, 3, low, low), low_res_log_snr=torch.full((1, 1, 1, 1), 4.0))


def noise(*shape: int) -> Tensor:
    """Random numbers, the same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def first(estimate: Any) -> Tensor:
    """x_hat of an estimate."""
    return estimate[0] if isinstance(estimate, tuple) else estimate


def picture_rows(device: torch.device) -> list[Row]:
    """The same seed on CPU and GPU, and twice on the GPU."""
    from cascade import CascadePipeline

    exact_arithmetic()
    until = None if device.type == "cuda" else 64
    drawn = []
    for place in (torch.device("cpu"), device, device):
        pipeline = CascadePipeline.from_pretrained(device=place, dtype=torch.float32)
        drawn.append(pipeline(PROMPT, seed=1, until=until, output_type="np").images)
    far = abs(drawn[0].astype(int) - drawn[1].astype(int))
    said = f"at most {far.max()} of 255 away, mean {far.mean():.3f}; at most 2"
    return [
        Row("same seed, same picture as on a CPU", bool(far.max() <= 2), said),
        Row("same picture twice", bool((drawn[1] == drawn[2]).all()), "equal in every byte"),
    ]


def generate_rows(device: torch.device) -> list[Row]:
    """Seconds from prompt to picture, measured as in bench_generate."""
    from bench_generate import stage_seconds

    from cascade import CascadePipeline

    said = []
    for batch in (1, 8) if device.type == "cuda" else (1,):
        pipeline = CascadePipeline.from_pretrained(device=device)
        prompts: Any = PROMPT if batch == 1 else [PROMPT] * batch
        stage_seconds(pipeline, prompts, None)
        runs = [stage_seconds(pipeline, prompts, None) for _ in range(3)]
        parts = ", ".join(f"{name} {median(run[name] for run in runs):.3f}" for name in runs[0])
        said.append(f"{median(sum(run.values()) for run in runs):.3f} s for {batch} ({parts})")
    return [Row("bench_generate", True, "; ".join(said))]


def train_rows(device: torch.device, compiled: bool) -> list[Row]:
    """The real trainer's pictures per second and MFU, and its peak memory compared with preflight's estimate."""
    from bench_train import machine_peak, pass_gflop, run_trainer, settings

    from cascade.training.memory import training_memory

    gpu = device.type == "cuda"
    preset, precision = ("preset:small/base", "bf16") if gpu else ("preset:tiny/base", "fp32")
    changes = [f"training.precision={precision}", f"training.compile={compiled}", f"data.workers={8 if gpu else 0}"]
    changes += [f"training.batch_size={64 if gpu else 4}"]
    with tempfile.TemporaryDirectory() as folder:
        run = settings(preset, changes, 30 if gpu else 2, folder)
        measured = run_trainer(run)
    peak = next((peak for part, peak in DATASHEETS.items() if gpu and part in torch.cuda.get_device_name()), None)
    share = "MFU" if peak else "of the convolution peak"
    rate = pass_gflop(run.stage, run.data.crop) * measured.images_per_second
    said = f"{measured.images_per_second:.0f} images/s, {rate / (peak or machine_peak(run)):.0%} {share}"
    name = f"bench_train, {'compiled' if compiled else 'eager'}"
    rows = [Row(name, True, f"{said}, data wait {measured.data_wait_share:.0%}")]
    if not compiled:
        expected = training_memory(run).total / 1e9
        fits = measured.gigabytes >= 0.95 * expected if gpu else None  # of a CPU the whole process is measured
        said = f"{measured.gigabytes:.2f} GB, preflight at least {expected:.2f}"
        rows.append(Row("peak memory", fits and measured.gigabytes <= 2 * expected + 1, said))
    return rows


def if_rows(device: torch.device) -> list[Row]:
    """IF's network compared with diffusers', alternating."""
    import bench_if

    gpu = device.type == "cuda"
    model, dtype = ("if-i-m", torch.bfloat16) if gpu else ("tiny", torch.float32)
    torch.manual_seed(0)
    with torch.inference_mode():
        ours, theirs = bench_if.calls(bench_if.stage_config(model), dtype, device, False)
        answers = ours().float(), theirs().float()
        pairs = [(bench_if.timed(ours), bench_if.timed(theirs)) for _ in range(10)]
    error = float((answers[0] - answers[1]).abs().max() / answers[1].abs().max())
    ratio = median(peer / own for own, peer in pairs)
    said = f"{1000 * median(own for own, _ in pairs):.1f} ms, {ratio:.2f} times as fast as diffusers; {error:.1e} apart"
    return [Row(f"bench_if, {model}", error < (0.1 if gpu else 1e-3), said)]


def fp16_rows(device: torch.device) -> list[Row]:
    """50 steps with loss scaling."""
    if device.type == "cpu":
        return [Row("fp16, 50 steps", None, "fp16 needs a GPU")]
    run, entries = short_run(50, "training.precision=fp16")
    scaler = run.accelerator.scaler
    losses = [entry["loss"] for entry in entries]
    good = scaler is not None and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    said = f"loss {losses[0]:.3g} to {losses[-1]:.3g}, scale {scaler.get_scale():.0f}"
    return [Row("fp16, 50 steps", good, said)]


def ddp_rows(device: torch.device) -> list[Row]:
    """DDP with one process over nccl; its losses equal those of a run without DDP."""
    if device.type == "cpu":
        return [Row("DDP over nccl", None, "nccl needs a GPU")]
    _, alone = short_run(5, "training.precision=fp32")
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(where, MASTER_PORT=str(free_port()))
    from accelerate import PartialState

    PartialState._reset_state()
    run, entries = short_run(5, "training.precision=fp32")
    wrapped, backend = type(run.network).__name__, torch.distributed.get_backend()
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(entries, alone, strict=True))
    good = wrapped == "DistributedDataParallel" and "nccl" in backend and apart < 1e-3
    return [Row("DDP over nccl", good, f"{wrapped}, {backend}, losses {apart:.1e} from those without")]


def short_run(steps: int, *changes: str) -> tuple[Any, list[dict[str, float]]]:
    """The trainer after a run of the tiny base stage, and a log entry a step."""
    from bench_train import RandomText, settings

    from cascade.stage import build_stage
    from cascade.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        own = [f"training.steps={steps}", "training.log_every=1", "training.batch_size=16", *changes]
        config = settings("preset:tiny/base", own, steps, folder)
        run = Trainer(config, build_stage(config.stage), RandomText(config.stage.model.text_dim))
        assert run.run()
        lines = (Path(config.output) / "log.jsonl").read_text().splitlines()
    return run, [json.loads(line) for line in lines]


def free_port() -> int:
    """A free port."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


TOGETHER: dict[str, Check] = {
    "tests": pytest_rows,
    "parity": parity_rows,
    "picture": picture_rows,
    "fp16": fp16_rows,
    "ddp": ddp_rows,
}
"""Checks of results, run in parallel."""
ALONE: dict[str, Check] = {
    "generate": generate_rows,
    "train": lambda device: train_rows(device, compiled=False),
    "train-compiled": lambda device: train_rows(device, compiled=True),
    "if": if_rows,
}
"""Checks that measure time."""


@dataclass(frozen=True)
class Running:
    """The command of a check by name, the folder for outputs, and the deadline."""

    command: Callable[[str], Sequence[str]]
    logs: Path
    deadline: float

    def rows(self, name: str) -> list[Row]:
        """Run a check to its end, or to the deadline."""
        log = self.logs / f"{name}.log"
        left = self.deadline - time.monotonic()
        if left <= 0:
            return [Row(name, False, "not started: no time left")]
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    self.command(name), stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False
                )
            except subprocess.TimeoutExpired:
                return [Row(name, False, f"not done in time; see {log}")]
        lines = log.read_text(errors="replace").splitlines()
        rows = [Row(**json.loads(line.removeprefix(RESULT))) for line in lines if line.startswith(RESULT)]
        if done.returncode or not rows:
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            rows.append(Row(name, False, f"ended with {done.returncode}: {last[:100]}; see {log}"))
        return rows


def all_rows(running: Running, together: Sequence[str], alone: Sequence[str]) -> list[Row]:
    """The rows of all checks, in order."""
    with ThreadPoolExecutor(max(len(together), 1)) as pool:
        rows = [row for found in pool.map(running.rows, together) for row in found]
    return rows + [row for name in alone for row in running.rows(name)]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    words = {True: "good", False: "FAILED", None: "left out"}
    lines = [f"| {row.name} | {words[row.ok]} | {row.said} |" for row in rows]
    return "\n".join(["| check | result | |", "| --- | --- | --- |", *lines])


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--seconds", default=240, show_default=True, help="For everything; what is not done then has failed.")
@click.option("--only", multiple=True, type=click.Choice([*TOGETHER, *ALONE]), help="A check; default: all.")
@click.option("--logs", type=click.Path(path_type=Path), help="Folder for what the checks print; default: a new one.")
@click.option("--one", hidden=True, help="Run this check here.")
def main(device: str, seconds: int, only: tuple[str, ...], logs: Path | None, one: str | None) -> None:
    """Print the table; exit status 1 when a check failed."""
    if one is not None:
        for row in (TOGETHER | ALONE)[one](torch.device(device)):
            print(RESULT + json.dumps(asdict(row)), flush=True)
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no GPU here; --device cpu shows that the script itself works")
    start = time.monotonic()
    folder = logs or Path(tempfile.mkdtemp(prefix="check-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--device", device, "--one"]
    running = Running(lambda name: [*command, name], folder, start + seconds)
    chosen = only or (*TOGETHER, *ALONE)
    rows = all_rows(running, [name for name in TOGETHER if name in chosen], [name for name in ALONE if name in chosen])
    where = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{where}, torch {torch.__version__}, {time.monotonic() - start:.0f} s\n\n{table(rows)}")
    sys.exit(any(row.ok is False for row in rows))


if __name__ == "__main__":
    main()
