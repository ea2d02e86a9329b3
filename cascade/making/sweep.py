"""Steps and guidance of a base stage, chosen by drawing held-out captions with several settings.

Two figures on the features of the art suite's image tower: the kernel distance between drawings and true pictures, and
the match, by how much a drawing is nearer to the true picture of its own caption than to the others. Guidance raises
the match and, beyond some weight, the distance; so the settings are ranked by both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.evaluation.distances import kernel_distance
from cascade.images import from_pil, to_float
from cascade.pipeline import CascadePipeline

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (8, 16, 32)
_ALLOWED = 0.05
"""A setting with fewer network calls is preferred if its match is lower by at most this share, and likewise its
distance higher."""


@dataclass(frozen=True)
class Trial:
    """A setting and its figures; `calls`: network calls per picture."""

    steps: int
    guidance: float
    distance: float
    match: float

    @property
    def calls(self) -> int:
        """Network calls per picture: two per step with guidance."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def described(self) -> dict[str, float]:
        """As JSON."""
        return {**asdict(self), "calls": self.calls}


Features = Callable[[Tensor], Tensor]
"""Pictures (N, 3, H, W) in [-1, 1] -> (N, D)."""


def sweep(
    pipeline: CascadePipeline, captions: Sequence[str], truth: Tensor, features: Features, steps: int = 16
) -> list[Trial]:
    """Trials of each guidance at `steps`, then of other steps at the best guidance. truth: (N, 3, H, W) in [-1, 1]."""
    true = features(truth)

    def trial(steps: int, guidance: float) -> Trial:
        side = pipeline.slots[0].config.resolution
        drawn = pipeline(
            list(captions), seed=list(range(len(captions))), until=side, steps={"base": steps},
            guidance={"base": guidance}, batch_size=8,
        )  # fmt: skip
        found = features(torch.stack([to_float(from_pil(image)) for image in drawn.images]))
        return Trial(steps, guidance, kernel_distance(_scaled(true, true), _scaled(found, true)), match(true, found))

    trials = [trial(steps, guidance) for guidance in GUIDANCES]
    guidance = best(trials).guidance
    return trials + [trial(count, guidance) for count in STEPS if count != steps]


def match(true: Tensor, drawn: Tensor) -> float:
    """Mean cosine of each drawing with its own true picture, less that with the others: (N, D), (N, D) -> [-2, 2]."""
    centre = true.mean(dim=0)
    cosines = F.normalize(drawn - centre, dim=1) @ F.normalize(true - centre, dim=1).T
    own = cosines.diagonal()
    others = (cosines.sum(dim=1) - own) / (len(true) - 1)
    return float((own - others).mean())


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the lowest sum of both ranks; of nearly equal ones that with the fewest network calls."""

    def rank(trial: Trial) -> int:
        better = [(one.distance < trial.distance) + (one.match > trial.match) for one in trials]
        return sum(better)

    first = min(trials, key=lambda trial: (rank(trial), trial.calls))
    margin = _ALLOWED * max(abs(first.distance), 1e-6)
    near = [
        trial
        for trial in trials
        if trial.match >= first.match - _ALLOWED * abs(first.match) and trial.distance <= first.distance + margin
    ]
    return min(near, key=lambda trial: trial.calls)


def _scaled(features: Tensor, by: Tensor) -> Tensor:
    """Features with the mean and spread of `by` removed, so that every one counts alike in the kernel."""
    return (features - by.mean(dim=0)) / by.std(dim=0).clamp(min=1e-3)


def chosen_places(total: int, count: int) -> list[int]:
    """`count` of `total` places, always the same ones."""
    return sorted(random.Random(0).sample(range(total), min(count, total)))
