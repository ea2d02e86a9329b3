"""Noise schedules: from time t in [0, 1], clean to noise, to log SNR. The book's step t of T is t / T here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.diffusion.noise import CLEAN, LOG_SNR_RANGE
from cascade.system.transfer import on_device


class NoiseSchedule(Protocol):
    """Noise level as a function of time."""

    @property
    def steps(self) -> int | None:
        """Number of steps T of a discrete schedule, None for a continuous one."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Log SNR at t in [0, 1], decreasing, finite at both ends; same shape as t, float32."""


class ReverseStep(NamedTuple):
    """One step back from a noise level. before: log SNR after it. small, large: log variance of the posterior, of beta.

    Each (B, 1, 1, 1). The first step's posterior has variance 0; the second's is used instead (Nichol & Dhariwal 2021,
    in their code).
    """

    before: Tensor
    small: Tensor
    large: Tensor


class Held:
    """A float32 table with a copy kept on each device that used it, so that no step copies or waits."""

    def __init__(self, table: Tensor) -> None:
        """table: on the CPU."""
        self._copies = {table.device: table}

    def on(self, device: torch.device) -> Tensor:
        """The table on a device."""
        if device not in self._copies:
            with torch.inference_mode(False):  # an inference tensor could not be used in training
                self._copies[device] = on_device(next(iter(self._copies.values())), device)
        return self._copies[device]


def _reverse_steps(table: Tensor) -> Tensor:
    """For each step back: log SNR after it, log variance of the posterior and of beta, computed in float64: (3, T)."""
    before, after = table[:-1], table[1:]
    inner = torch.arange(len(before)).clamp(min=min(1, len(before) - 1))
    small = -torch.expm1(after - before)[inner] * torch.sigmoid(-before)[inner]
    large = -torch.expm1(after - before) * torch.sigmoid(-after)
    return torch.stack([before, small.log(), large.log()]).float()


class DiscreteSchedule:
    """The log SNR of alpha_t = prod(1 - beta_s) at t = k / T, linear in between."""

    def __init__(self, betas: Tensor) -> None:
        """betas: (T,), beta_1 .. beta_T in (0, 1)."""
        self.betas = betas.double()
        log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-self.betas).cumsum(0)])
        # log alpha - log(1 - alpha), without the cancellation of 1 - alpha near t = 0
        log_snr = log_alpha - torch.log(-torch.expm1(log_alpha))
        self.table = log_snr.clamp(*LOG_SNR_RANGE)
        self._levels, self._steps = Held(self.table[1:].float()), Held(_reverse_steps(self.table))

    @property
    def steps(self) -> int | None:
        return len(self.betas)

    def log_snr(self, t: Tensor) -> Tensor:
        """Exact at the steps k / T; see NoiseSchedule."""
        position = t.double().clamp(0, 1) * len(self.betas)
        # k / T in float32, times T, may miss the integer k by rounding; it means step k
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-3, nearest, position)
        low = position.floor().long().clamp(max=len(self.betas) - 1)
        table = self.table.to(t.device)
        return torch.lerp(table[low], table[low + 1], position - low).float()

    def nearest_step(self, log_snr: Tensor) -> Tensor:
        """Index, from 0 for beta_1 to T - 1, of the step whose log SNR is nearest: (B, 1, 1, 1) -> (B,) int64.

        For networks that were trained on step numbers, such as DeepFloyd IF's.
        """
        return (log_snr.float().flatten()[:, None] - self._levels.on(log_snr.device)).abs().argmin(dim=1)

    def reverse_step(self, log_snr: Tensor) -> ReverseStep:
        """From the step nearest to log_snr (B, 1, 1, 1) to the one before it."""
        steps = self._steps.on(log_snr.device)[:, self.nearest_step(log_snr), None, None, None]
        return ReverseStep(*steps.unbind())


def constant_betas(beta: float, steps: int) -> Tensor:
    """The same beta at every step (Prince 2023, sec. 18.2)."""
    return torch.full((steps,), beta, dtype=torch.float64)


def linear_betas(start: float, end: float, steps: int) -> Tensor:
    """beta from `start` to `end` in equal steps (Ho et al. 2020: 1e-4 to 0.02 in 1000)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def squared_cosine_betas(steps: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - f(t/T) / f((t-1)/T), f(t) = cos^2(pi/2 (t + 0.008) / 1.008), capped.

    Source: Nichol & Dhariwal (2021) eq. 17, as diffusers' `squaredcos_cap_v2`.
    """
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


class CosineSchedule:
    """alpha = cos^2(a) / cos^2(a_0) at the angle a = (t + s) / (1 + s) pi / 2, plus a shift of log SNR, clipped.

    Without the offset s, log SNR = -2 log tan(pi t / 2). Source: Nichol & Dhariwal (2021) eq. 17; the shift
    2 log(reference / resolution) of simple diffusion (Hoogeboom et al. 2023, eq. 5): twice the resolution needs four
    times the noise variance.
    """

    steps: int | None = None

    def __init__(self, shift: float = 0.0, clip: tuple[float, float] = LOG_SNR_RANGE, offset: float = 0.0) -> None:
        self.shift = shift
        self.clip = clip
        self.offset = offset

    def log_snr(self, t: Tensor) -> Tensor:
        """See NoiseSchedule."""
        first = self.offset / (1 + self.offset) * (math.pi / 2)
        angle = first + t.double().clamp(0, 1) * (math.pi / 2 - first)
        # 1 - alpha = sin(a - a_0) sin(a + a_0) / cos^2(a_0), which does not cancel near t = 0
        noise = (angle - first).sin().clamp(min=1e-30).log() + (angle + first).sin().clamp(min=1e-30).log()
        log_snr = 2 * angle.cos().clamp(min=1e-30).log() - noise
        return (log_snr + self.shift).clamp(*self.clip).float()


def resolution_shift(resolution: int, reference: int) -> float:
    """Shift of log SNR that gives pictures of `resolution`, after averaging down, the noise of `reference`."""
    return 2 * math.log(reference / resolution)


EvenSteps = Literal["t", "log_snr"]
"""Spacing of steps that is even in time, or in log SNR."""
WholeSteps = Literal["leading", "trailing"]
"""Spacing by whole steps of a discrete schedule that includes its first step (`leading`) or its last (`trailing`)."""
Spacing = Literal[EvenSteps, WholeSteps]
NamedSteps = Literal["fast27", "smart27", "smart50", "smart100", "smart185", "super27", "super100"]
"""DeepFloyd IF's step lists."""

SECTIONS: dict[NamedSteps, tuple[int, ...]] = {
    "fast27": (10, 10, 3, 2, 2),
    "smart27": (7, 4, 2, 1, 2, 4, 7),
    "smart50": (10, 6, 4, 3, 2, 2, 3, 4, 6, 10),
    "smart100": (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 13),
    "smart185": (1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20),
    "super27": (1, 1, 1, 1, 1, 1, 1, 2, 5, 13),
    "super100": (4, 4, 6, 6, 8, 8, 10, 10, 14, 30),
}
"""For each list, the number of steps in each of equal parts of the schedule, low noise first."""


def named_steps(name: NamedSteps, total: int = 1000) -> tuple[int, ...]:
    """The steps of a named list, numbered from 0, high noise first: both ends of each part, evenly spaced in between.

    Source: the respacing of Nichol & Dhariwal (2021) sec. 4, which DeepFloyd IF's lists follow.
    """
    counts = SECTIONS[name]
    length, longer = divmod(total, len(counts))
    chosen: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        size = length + (index < longer)
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        chosen += [start + round(place * stride) for place in range(count)]
        start += size
    return tuple(reversed(chosen))


def spaced_steps(steps: int, spacing: WholeSteps, total: int = 1000) -> tuple[int, ...]:
    """Evenly spaced steps, numbered from 0, high noise first: `leading` ends at 0, `trailing` begins at the last.

    Source: Lin et al. (2023) arXiv 2305.08891, table 2.
    """
    if spacing == "leading":
        return tuple(index * (total // steps) for index in reversed(range(steps)))
    return tuple(round(total - index * total / steps) - 1 for index in range(steps))


def step_grid(schedule: NoiseSchedule, numbers: Sequence[int]) -> Tensor:
    """The noise levels of a sampler at these steps of a discrete schedule, numbered from 0, and clean at the end."""
    assert schedule.steps is not None, "a continuous schedule has no numbered steps"
    times = torch.tensor([*(number + 1 for number in numbers), 0], dtype=torch.float64) / schedule.steps
    return schedule.log_snr(times)


def log_snr_grid(schedule: NoiseSchedule, steps: int, spacing: EvenSteps = "t") -> Tensor:
    """The noise levels of a sampler: (steps + 1,), increasing log SNR from t = 1 to t = 0, the last one clean.

    spacing: `t`, even in time, or `log_snr`, even in log SNR. With `t`, a discrete schedule and steps = T these are the
    T steps of algorithm 18.2, whose last one ends at x even if the schedule is clipped.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if spacing == "t":
        levels = schedule.log_snr(t)
    else:
        ends = schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64))
        levels = torch.lerp(ends[:1], ends[1:], (1 - t).float())
    return torch.cat([levels[:-1], torch.tensor([CLEAN])])
