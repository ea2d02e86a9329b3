"""Adafactor: an adaptive optimizer that stores only row and column means of a matrix's squared gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETA2_DECAY = -0.8
"""Share of the newest squares in the second moment is step^BETA2_DECAY: 1 in the first step, less later."""
SMALLEST_SCALE = 1e-3
"""Lower bound of the RMS of a weight by which its step is scaled, so that a layer that starts at zero moves."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a kernel as the matrix (out, in * height * width), as in Muon; torch's factors its 3 x 3 taps.

    The second moment of a matrix is the product of its row and column means divided by their mean; that of a vector is
    stored in full. A step is clipped to an RMS of 1 and scaled by the RMS of the weight. State: `rows` (out, 1, ...)
    and `columns` (1, in, ...), independent of the memory layout and sharded like the weight; `squares`, in the shape of
    a vector; `step`. Nothing is read from the device.
    Source: Shazeer & Stern (2018) algorithms 4 to 6, without momentum, with the constants of `torch.optim.Adafactor`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float) -> None:
        """groups: weights, each with its weight_decay. lr: upper bound of the rate, which is at most 1 / sqrt(step)."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - none is ever passed
        """One step, at the current learning rate of the groups."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _move(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1  # stays on the CPU
        count = float(state["step"])
        smallest = torch.finfo(parameter.dtype).eps ** 2
        update = _second_moment(state, gradient, count**BETA2_DECAY).clamp_(min=smallest).rsqrt_().mul_(gradient)
        size = _rms(parameter).clamp(min=SMALLEST_SCALE) * min(lr, count**-0.5)
        if weight_decay:
            parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(update.mul_(size / _rms(update).clamp(min=1)))


def remembered_numbers(weight: Tensor) -> int:
    """The number of values that Adafactor stores for a weight, without the step count."""
    return weight.shape[0] + weight[0].numel() if weight.ndim >= 2 else weight.numel()


def _second_moment(state: dict[str, Any], gradient: Tensor, share: float) -> Tensor:
    """The running average of squared gradients, with weight `share` for this one: a new tensor of its shape."""
    if gradient.ndim < 2:
        return _average(state, "squares", gradient.square(), share).clone()
    rest = tuple(range(1, gradient.ndim))
    rows = _average(state, "rows", _mean_square(gradient, rest), share)
    columns = _average(state, "columns", _mean_square(gradient, (0,)), share)
    return rows * columns / rows.mean(dim=0, keepdim=True).clamp(min=torch.finfo(rows.dtype).eps)


def _average(state: dict[str, Any], name: str, value: Tensor, share: float) -> Tensor:
    """The running average `name` after moving it towards `value` by a share, which is 1 in the first step."""
    state[name] = state[name].lerp_(value, share) if name in state else value
    average: Tensor = state[name]
    return average


def _mean_square(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of the squares over `dims`, which are kept with length 1; no tensor of squares is allocated."""
    count = math.prod(gradient.shape[dim] for dim in dims)
    return torch.linalg.vector_norm(gradient, dim=dims, keepdim=True).square() / count


def _rms(tensor: Tensor) -> Tensor:
    """Root mean square, a zero-dimensional tensor."""
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
