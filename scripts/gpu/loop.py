"""Training for a fixed time: the learning rate is annealed at any speed, and an interrupted run leaves weights.

The learning rate follows the time, not the steps: warm-up, constant, linear to zero over the last part of the minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from cascade.config.stage import StageConfig
from gpu.loss import Levels, Measured, loss_of
from gpu.network import fill, network, write_parts
from gpu.optim import Average, Muon
from gpu.views import Views

STARTED = time.monotonic()
AVERAGES = (0.05, 0.10)
"""Widths of the averages, as shares of the run."""
WORST = 2.0
"""A loss above this is a divergence: v itself has a mean square below 1."""


def say(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:7.1f}", *words, flush=True)


@dataclass(frozen=True)
class Task:
    """A stage and how it is trained. compiled: its blocks. flatness: see `loss_of`."""

    stage: StageConfig
    views: Views
    levels: Levels
    flatness: float = 0.0
    compiled: bool = False


@dataclass(frozen=True)
class Phase:
    """Start as a share of the time, side of the pictures, and pictures per step."""

    begins: float
    size: int
    batch: int


@dataclass(frozen=True)
class Timing:
    """A run's clock. minutes: total. decay: the share of the time over which the learning rate falls.

    warmup: steps. save_every: seconds between saved averages, for a run that is interrupted.
    """

    minutes: float
    learning_rate: float
    phases: tuple[Phase, ...]
    decay: float = 0.25
    warmup: int = 100
    log_every: int = 50
    save_every: float = 200

    def phase(self, now: float) -> Phase:
        """The current phase. now: elapsed share of the time."""
        return [phase for phase in self.phases if phase.begins <= now][-1]

    def rate(self, step: int, now: float) -> float:
        """The learning rate of a step."""
        return self.learning_rate * min(1.0, (1 - now) / self.decay, (step + 1) / self.warmup)


class Run:
    """A network in training, with its optimizer and its averages."""

    def __init__(self, task: Task, device: torch.device, init: Sequence[Tensor] | None = None) -> None:
        """init: initial weights, in the order of the parameters."""
        self.task, self.device = task, device
        self.net = network(task.stage, device, task.compiled)
        if init is not None:
            fill(self.net, init)
        self.net.train()
        self.names = [name for name, _ in self.net.named_parameters()]
        self.params: list[Tensor] = list(self.net.parameters())
        self.optimizer = Muon(self.net)
        self.averages = {std: Average(self.params, std) for std in AVERAGES}
        self.generator = torch.Generator(device).manual_seed(1)

    def step(self, phase: Phase, learning_rate: float) -> Tensor:
        """One step; its mean loss, still on the device."""
        view = self.task.views(phase.batch, phase.size, self.generator)
        log_snr = self.task.levels.draw(phase.batch, self.generator)
        eps = torch.randn(view.x.shape, device=self.device, generator=self.generator)
        loss = loss_of(self.net, view, log_snr, eps, self.task.flatness).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step(learning_rate)
        for parameter in self.params:
            parameter.grad = None
        for average in self.averages.values():
            average.update(self.params)
        return loss.detach()

    def write(self, weights: Sequence[Tensor], out: Path, name: str) -> None:
        """`write_parts` of weights in the order of the parameters."""
        write_parts(dict(zip(self.names, weights, strict=True)), out, name)


@dataclass
class Safe:
    """The last good weights and averages, and the bound on the loss."""

    run: Run
    lowest: float = math.inf
    slowed: float = 1.0
    """Factor on the learning rate: halved by each divergence."""
    copies: list[list[Tensor]] = field(default_factory=list)

    def keep(self) -> None:
        """Save the current state for `restore`."""
        self.copies = [[w.detach().clone() for w in weights] for weights in self._everything()]

    @torch.no_grad()
    def restore(self) -> None:
        """Return to the saved state, at half the rate."""
        for kept, weights in zip(self.copies, self._everything(), strict=True):
            torch._foreach_copy_(weights, kept)
        self.run.optimizer.forget()
        self.slowed /= 2

    def diverged(self, loss: float) -> bool:
        """Whether the loss is not below its bound, as for NaN."""
        if not loss < min(2 * self.lowest, WORST):
            return True
        self.lowest = min(self.lowest, loss)
        return False

    def _everything(self) -> list[list[Tensor]]:
        return [self.run.params, *(average.mean for average in self.run.averages.values())]


@dataclass
class Progress:
    """Progress of a run. size: side of its pictures; losses: of the steps since the last line of the log."""

    name: str
    began: float = field(default_factory=time.monotonic)
    step: int = 0
    views: int = 0
    size: int = 0
    losses: list[Tensor] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def count(self, phase: Phase, loss: Tensor) -> None:
        """Count one step."""
        self.step, self.views, self.size = self.step + 1, self.views + phase.batch, phase.size
        self.losses.append(loss)

    def tell(self, log: TextIO, rate: float) -> float:
        """Write a line to the log and the console; the mean loss since the last line, read from the GPU."""
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        own = {"step": self.step, "views": self.views, "seconds": self.seconds, "size": self.size}
        log.write(json.dumps(own | {"loss": loss, "rate": rate}) + "\n")
        log.flush()
        speed = f"{self.views / 1e6:.2f} M views, {self.views / self.seconds:.0f}/s"
        say(f"{self.name} {self.step}: {speed}, {self.size} px, loss {loss:.4f}")
        return loss


Check = Callable[[Sequence[Tensor]], Measured]
"""A measurement of weights on held-out views."""


def train(run: Run, timing: Timing, out: Path, name: str, stopped: Callable[[], bool], check: Check) -> list[Tensor]:
    """Train until the time is over; returns the average with the smaller loss on held-out views.

    Writes <name>-* (that average), other-<name>-*, raw-<name>-* (weights before the decay, for a later run, since
    annealed ones resume badly), guide-<name>-* (the average after an eighth of the time, a weak model for autoguidance)
    and <name>.jsonl. After a divergence the run continues from earlier weights at half the rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    safe = Safe(run)
    safe.keep()
    due = {"guide": (0.125, run.averages[0.10].mean), "raw": (1 - timing.decay, run.params)}
    at = Progress(name)
    saved = 0.0
    with (out / f"{name}.jsonl").open("w") as log:
        while not stopped() and (now := at.seconds / (60 * timing.minutes)) < 1:
            phase, rate = timing.phase(now), timing.rate(at.step, now) * safe.slowed
            if phase.size != at.size:  # losses differ between sizes
                safe.lowest = math.inf
            at.count(phase, run.step(phase, rate))
            for kind in [kind for kind, (begins, _) in due.items() if now > begins]:
                run.write(due.pop(kind)[1], out, f"{kind}-{name}")
            if at.step % timing.log_every == 0:
                loss = at.tell(log, rate)
                if safe.diverged(loss):
                    say(f"{name} {at.step}: loss {loss:.4f} after {safe.lowest:.4f}; earlier weights, half the rate")
                    safe.restore()
                elif at.step % (4 * timing.log_every) == 0 and loss < 1.2 * safe.lowest:
                    safe.keep()
            if at.seconds - saved > timing.save_every:
                saved = at.seconds
                run.write(run.averages[0.05].mean, out, name)
                say(f"{name}, average so far:", check(run.averages[0.05].mean))
    if not all(map(torch.isfinite, at.losses)):  # since the last line of the log
        say(f"{name} {at.step}: not finite at the end; earlier weights")
        safe.restore()
    for kind, (_, weights) in due.items():  # if the run was stopped, or its last step was long
        run.write(weights, out, f"{kind}-{name}")
    return _best(run, out, name, check)


def _best(run: Run, out: Path, name: str, check: Check) -> list[Tensor]:
    found = {std: check(average.mean) for std, average in run.averages.items()}
    best, other = sorted(AVERAGES, key=lambda std: found[std].loss)
    for std in AVERAGES:
        say(f"{name}, average over {std} of the run{' (kept)' if std == best else ''}:", found[std])
    run.write(run.averages[best].mean, out, name)
    run.write(run.averages[other].mean, out, f"other-{name}")
    return run.averages[best].mean
