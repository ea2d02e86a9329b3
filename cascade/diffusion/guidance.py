"""Guidance in more general form: rules for extrapolation, and several conditions composed into one denoiser.

A rule maps the estimates with and without the condition to one. `cascade.diffusion.denoisers.guide` and `compose` use
it; both return denoisers, so that samplers, thresholds and known pixels work with any of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic

import torch
from torch import Tensor

from cascade.diffusion.denoisers import ConditionalDenoiser, Conditions, Rule, linear
from cascade.diffusion.noise import Denoiser, Estimate, diffuse, number_of, x_of

_LEAST_NORM = 1e-12  # squared; below it a picture has no direction


def by_level(points: Sequence[tuple[float, float]], weight: float) -> Rule:
    """Linear guidance whose weight depends on log SNR: 1 + f (weight - 1).

    points: (log SNR, f), increasing in log SNR; f is linear between them and constant beyond. Source: Kynkaanniemi et
    al. (2024) for the reason; their interval is the special case of a step from 0 to 1 and back.
    """
    levels, factors = zip(*points, strict=True)

    def factor(level: float) -> float:
        after = bisect_right(levels, level)
        if after in (0, len(levels)):
            return float(factors[0 if after == 0 else -1])
        low, high = levels[after - 1], levels[after]
        share = (level - low) / (high - low)
        return float(factors[after - 1] + share * (factors[after] - factors[after - 1]))

    return lambda x_cond, x_null, log_snr: x_null + (1 + factor(number_of(log_snr)) * (weight - 1)) * (x_cond - x_null)


def rescaled(rule: Rule, share: float) -> Rule:
    """The rule with the standard deviation of its x_hat moved back, by `share`, to that of x_cond.

    share: in [0, 1]; 0 changes nothing. Strong guidance makes pictures too contrasty; this undoes it for each picture.
    Source: Lin et al. (2023), arXiv 2305.08891, eq. 15 and 16, for x_hat in place of v.
    """

    def applied(x_cond: Tensor, x_null: Tensor, log_snr: Tensor) -> Tensor:
        x_hat = rule(x_cond, x_null, log_snr)
        ratio = _std(x_cond) / _std(x_hat).clamp(min=_LEAST_NORM)
        return x_hat * (share * ratio + 1 - share)

    return applied


class Projected:
    """Adaptive projected guidance: the update's part along x_cond, which saturates colours, is reduced.

    One object serves one generation, because it keeps the running mean of the updates. parallel: factor on the part
    along x_cond; 1 leaves it. momentum: weight of the earlier updates in the running sum; negative values push away
    from them. radius: largest root mean square of the update; None: no limit. With parallel 1, momentum 0 and no radius
    it is `linear`. Source: Sadat et al. (2024), arXiv 2410.02416, algorithm 1; there the radius is a norm, which
    depends on the size of the picture.
    """

    def __init__(
        self, weight: float, parallel: float = 0.0, momentum: float = 0.0, radius: float | None = None
    ) -> None:
        self._weight, self._parallel, self._momentum, self._radius = weight, parallel, momentum, radius
        self._sum: Tensor | None = None

    def __call__(self, x_cond: Tensor, x_null: Tensor, _log_snr: Tensor) -> Tensor:
        update = x_cond - x_null
        if self._momentum and self._sum is not None:
            update = update + self._momentum * self._sum
        self._sum = update
        if self._radius is not None:
            size = update.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            update = update * (self._radius / size.clamp(min=_LEAST_NORM)).clamp(max=1)
        along = _along(update, x_cond)
        return x_cond + (self._weight - 1) * (update - along + self._parallel * along)


def _along(update: Tensor, direction: Tensor) -> Tensor:
    """The projection of each picture (B, C, H, W) on another one."""
    product = (update * direction).sum(dim=(1, 2, 3), keepdim=True)
    return product / direction.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=_LEAST_NORM) * direction


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class Part(Generic[Conditions]):
    """One of several conditions of the same pictures, and its weight.

    weight: a number, (B, 1, 1, 1), or (B, 1, H, W) in each pixel, for a region.
    """

    cond: Conditions
    weight: float | Tensor = 1.0
    change: Callable[[Denoiser], Denoiser] | None = None
    """Applied to the part's denoiser, such as `within`."""

    def denoiser(self, model: ConditionalDenoiser[Conditions]) -> Denoiser:
        """The model's denoiser for this part."""
        plain = model.prepare(self.cond)
        return self.change(plain) if self.change else plain


@dataclass(frozen=True)
class Act(Generic[Conditions]):
    """The conditions from a share of the sampling steps, in [0, 1), until the next act. nulls: see `compose`."""

    start: float
    parts: Sequence[Part[Conditions]]
    nulls: Sequence[Part[Conditions]]


def compose(
    model: ConditionalDenoiser[Conditions],
    parts: Sequence[Part[Conditions]],
    nulls: Sequence[Part[Conditions]],
    rule: Rule | None,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Guidance by several conditions: rule(x_cond, x_null) with x_cond = x_null + sum of w_i (x_i - x_null).

    x_null is the weighted mean of the estimates of `nulls`. Without a rule, and outside `interval` in log SNR, x_hat is
    the mean of the x_i, weighted by the positive w_i. Each estimate is one call of the network. A variance is that of
    the first part.
    Source: Liu et al. (2022), arXiv 2206.01714, eq. 11, for x in place of eps. With weights that differ from pixel to
    pixel and add up to 1 it joins regions, as in Bar-Tal et al. (2023), arXiv 2302.08113.
    """
    own, null = ([(part.denoiser(model), part.weight) for part in each] for each in (parts, nulls))

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        estimates = [part(z, log_snr) for part, _ in own]
        x, weights = [x_of(estimate) for estimate in estimates], [weight for _, weight in own]
        outside = interval is not None and not interval[0] <= number_of(log_snr) <= interval[1]
        if rule is None or outside:
            x_hat = _mean(x, [_positive(weight) for weight in weights])
        else:
            x_null = _mean([x_of(part(z, log_snr)) for part, _ in null], [weight for _, weight in null])
            x_cond = x_null + sum((weight * (each - x_null) for each, weight in zip(x, weights, strict=True)), start=0)
            x_hat = rule(x_cond, x_null, log_snr)
        first = estimates[0]
        return (x_hat, first[1]) if isinstance(first, tuple) else x_hat

    return denoise


def coefficients(weights: Sequence[float]) -> list[float]:
    """The factors of the n + 1 estimates in `chain`; those of zero need no call of the network.

    weights: of the n conditions.
    """
    return [before - after for before, after in pairwise((1.0, *weights, 0.0))]


def chain(
    model: ConditionalDenoiser[Conditions],
    conds: Sequence[Conditions],
    weights: Sequence[float],
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Guidance with a weight for each of n conditions: x_0 + sum of w_i (x_i - x_(i-1)).

    conds: n + 1 of them; the first with nulls alone, each next with the null of one condition less. Each estimate with
    a factor other than 0 is one call of the network. interval: as for `guide`; outside it the last one acts alone. A
    variance is that of the last. Source: Brooks et al. (2023), arXiv 2211.09800, eq. 3, for n conditions, and for x in
    place of eps.
    """
    assert len(conds) == len(weights) + 1, "one condition more than weights"
    parts = [(factor, model.prepare(cond)) for factor, cond in zip(coefficients(weights), conds, strict=True) if factor]
    whole = model.prepare(conds[-1])

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        if interval is not None and not interval[0] <= number_of(log_snr) <= interval[1]:
            return whole(z, log_snr)
        estimates = [(factor, part(z, log_snr)) for factor, part in parts]
        x_hat = torch.stack([factor * x_of(estimate) for factor, estimate in estimates]).sum(dim=0)
        last = estimates[-1][1] if estimates else whole(z, log_snr)
        return (x_hat, last[1]) if isinstance(last, tuple) else x_hat

    return denoise


def _positive(weight: float | Tensor) -> float | Tensor:
    return weight.clamp(min=0) if isinstance(weight, Tensor) else max(weight, 0.0)


def _mean(x: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Weighted mean; the values themselves if there is one."""
    if len(x) == 1:
        return x[0]
    total = sum(weights)
    return torch.stack([each * (weight / total) for each, weight in zip(x, weights, strict=True)]).sum(dim=0)


def within(denoise: Denoiser, mask: Tensor, eps: Tensor) -> Denoiser:
    """The denoiser of a region alone: its network sees the region in the middle, and white around it.

    Otherwise an object that belongs into the region would be drawn in the middle of the picture, and cut by the
    region's edge. mask: (B, 1, H, W) in [0, 1], the region. eps: (B, C, H, W), the noise that the white gets.
    Source: Bar-Tal et al. (2023) sec. 4.2 replace the surroundings too (bootstrapping); the shift by whole pixels,
    which leaves the noise as it is, is ours.
    """
    shifts = [_to_centre(one[0]) for one in mask]

    def denoise_within(z: Tensor, log_snr: Tensor) -> Estimate:
        hidden = torch.lerp(diffuse(torch.ones_like(z), eps, log_snr), z, mask)
        seen = torch.stack([one.roll(shift, (1, 2)) for one, shift in zip(hidden, shifts, strict=True)])
        x_hat = x_of(denoise(seen, log_snr))
        back = [(-down, -right) for down, right in shifts]
        return torch.stack([one.roll(shift, (1, 2)) for one, shift in zip(x_hat, back, strict=True)])

    return denoise_within


def _to_centre(mask: Tensor) -> tuple[int, int]:
    """(down, right): pixels from the middle of a mask's bounding box to that of the picture (H, W)."""
    places = mask.nonzero()
    if not len(places):
        return 0, 0
    middle = (places.amin(0) + places.amax(0) + 1).tolist()
    return (mask.shape[0] - middle[0]) // 2, (mask.shape[1] - middle[1]) // 2


def switch(denoisers: Sequence[tuple[float, Denoiser]]) -> Denoiser:
    """The denoiser that takes over at a log SNR: of (log SNR, denoiser), increasing, the last whose level is reached.

    Before the first level the first one acts.
    """
    levels = [level for level, _ in denoisers]

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        acting = max(0, bisect_right(levels, number_of(log_snr)) - 1)
        return denoisers[acting][1](z, log_snr)

    return denoise


def autoguide(
    model: ConditionalDenoiser[Conditions],
    weaker: ConditionalDenoiser[Conditions],
    cond: Conditions,
    weight: float,
    rule: Rule | None = None,
) -> Denoiser:
    """Guidance away from a weaker version of the same model, with the same conditions: x_weak + weight (x - x_weak).

    weaker: such as an earlier checkpoint, or a smaller network. Unlike guidance by the null text it does not reduce
    the variety of the pictures. rule: default `linear`. Source: Karras et al. (2024), arXiv 2406.02507, eq. 3.
    """
    strong, weak, joined = model.prepare(cond), weaker.prepare(cond), rule or linear(weight)

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        estimate = strong(z, log_snr)
        x_hat = joined(x_of(estimate), x_of(weak(z, log_snr)), log_snr)
        return (x_hat, estimate[1]) if isinstance(estimate, tuple) else x_hat

    return denoise
