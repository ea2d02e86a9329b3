"""Functions from denoiser to denoiser: guidance, thresholding, conversion between a picture and its residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from cascade.diffusion.noise import Denoiser, Estimate, number_of, x_of


class Joinable(Protocol):
    """A batch of conditions of any kind, such as `cascade.conditioning.Conditioning`."""

    def joined(self, other: Self) -> Self:
        """This batch followed by another."""


Conditions = TypeVar("Conditions", bound=Joinable)
_Seen = TypeVar("_Seen", bound=Joinable, contravariant=True)


class ConditionalDenoiser(Protocol[_Seen]):
    """A denoiser that also takes conditions, such as a `Stage`."""

    def prepare(self, cond: _Seen) -> Denoiser:
        """The denoiser for these conditions; values that do not change between steps are computed here, once."""


Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_cond, x_null, log SNR (B, 1, 1, 1)) -> x_hat: how guidance combines two estimates."""


def linear(weight: float | Tensor) -> Rule:
    """The usual rule: x_null + weight (x_cond - x_null)."""
    return lambda x_cond, x_null, _log_snr: x_null + weight * (x_cond - x_null)


def guide(
    model: ConditionalDenoiser[Conditions],
    cond: Conditions,
    null: Conditions,
    weight: float | Tensor | Rule,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Classifier-free guidance: x_null + weight (x_cond - x_null), both halves in one batch.

    A variance that the model returns with x_hat is taken from `cond`, unguided, as in DeepFloyd IF.
    weight: 1 = none; a number, or (B, 1, 1, 1), one for each picture; or another rule, see
    `cascade.diffusion.guidance`.
    null: the conditions under the null text, or a negative prompt in its place.
    interval: log SNR range in which guidance acts; outside it only `cond` is evaluated, at half the cost.
    Source: Ho & Salimans (2022) eq. 6, for x in place of eps (the two are equal, since both are linear in the
    output at fixed z); the interval, Kynkaanniemi et al. (2024).
    """
    if not isinstance(weight, Tensor) and weight == 1:
        return model.prepare(cond)
    both = model.prepare(cond.joined(null))

    def guided(z: Tensor, log_snr: Tensor) -> Estimate:
        estimate = both(torch.cat([z, z]), torch.cat([log_snr, log_snr]))
        x_cond, x_null = x_of(estimate).chunk(2)
        x_hat = weight(x_cond, x_null, log_snr) if callable(weight) else x_null + weight * (x_cond - x_null)
        return (x_hat, estimate[1][: len(z)]) if isinstance(estimate, tuple) else x_hat

    if interval is None:
        return guided
    unguided, (low, high) = model.prepare(cond), interval

    def denoise(z: Tensor, log_snr: Tensor) -> Estimate:
        acts = low <= number_of(log_snr) <= high  # a sampler moves all pictures together
        return guided(z, log_snr) if acts else unguided(z, log_snr)

    return denoise


def with_changed(denoise: Denoiser, change: Callable[[Tensor], Tensor]) -> Denoiser:
    """The denoiser with `change` applied to its x_hat; a variance is left as it is."""

    def changed(z: Tensor, log_snr: Tensor) -> Estimate:
        estimate = denoise(z, log_snr)
        return (change(estimate[0]), estimate[1]) if isinstance(estimate, tuple) else change(estimate)

    return changed


def clip(denoise: Denoiser) -> Denoiser:
    """Static thresholding: x_hat is clipped to [-1, 1]."""
    return with_changed(denoise, lambda x_hat: x_hat.clamp(-1, 1))


def threshold(denoise: Denoiser, quantile: float, maximum: float = torch.inf) -> Denoiser:
    """Dynamic thresholding: clip x_hat to [-s, s] and divide it by s, a quantile of |x_hat|, where s exceeds 1.

    quantile: in (0, 1), such as 0.995, taken over each picture separately. maximum: cap on s (DeepFloyd IF's
    `sample_max_value`). Source: Saharia et al. (2022) sec. 2.3 and fig. A.10.
    """

    def scaled(x_hat: Tensor) -> Tensor:
        s = quantile_of_rows(x_hat.float().abs().flatten(1), quantile).clamp(1.0, maximum)
        s = s.to(x_hat.dtype)[:, None, None, None]
        return x_hat.clamp(-s, s) / s

    return with_changed(denoise, scaled)


def quantile_of_rows(values: Tensor, quantile: float) -> Tensor:
    """The quantile of each row, linear between neighbours: (B, n) -> (B,), equal in bits to `torch.quantile`.

    NaN for a row that contains NaN. `torch.quantile` refuses rows of more than 2^24 values; a picture of 2400 x 2400
    has more.
    """
    count = values.shape[1]
    rank = float(torch.tensor(quantile, dtype=values.dtype) * (count - 1))
    below = min(int(rank), count - 1)
    above = min(below + 1, count - 1)
    # Sorts only the values on the nearer side of the quantile: at 0.995 a 200th of them. `kthvalue` would take minutes
    # where the values are in descending order.
    if 2 * below >= count:
        ordered = values.topk(count - below, dim=1).values
        low, high = ordered[:, count - 1 - below], ordered[:, count - 1 - above]
    else:
        ordered = values.topk(above + 1, dim=1, largest=False).values
        low, high = ordered[:, below], ordered[:, above]
    broken = values.isnan().any(dim=1)
    return torch.lerp(low, high, rank - below).masked_fill(broken, math.nan)


def to_picture(denoise: Denoiser, base: Tensor, scale: float) -> Denoiser:
    """The denoiser of residuals with x_hat converted to a picture: base + scale x_hat.

    base: (B, C, H, W), the upsampled smaller picture; z remains the noisy residual. Diffusing r = (x - base) / scale
    from pure noise is a path from base plus noise of standard deviation `scale` to x, so one process serves both
    (ResShift, Yue et al. 2023, states it as a separate process). `clip` and `threshold` must act on the picture:
    to_residual(clip(to_picture(denoise, base, scale)), base, scale).
    """
    return with_changed(denoise, lambda x_hat: base + scale * x_hat)


def to_residual(denoise: Denoiser, base: Tensor, scale: float) -> Denoiser:
    """The inverse of `to_picture`."""
    return with_changed(denoise, lambda x_hat: (x_hat - base) / scale)
