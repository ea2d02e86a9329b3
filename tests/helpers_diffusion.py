"""Shared helpers of the tests of the mathematics."""

from __future__ import annotations

from torch import Tensor

from cascade.diffusion.noise import Prediction, predicted_eps, target


def from_x(kind: Prediction, x: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """The inverse of `to_x`: the output for this x."""
    return target(kind, x, predicted_eps(x, z, log_snr), log_snr)
