"""Adafactor: an adaptive step whose memory is the sums of a matrix's rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETA2_DECAY = -0.8
"""The second moment forgets as step^BETA2_DECAY: all of it in the first step, ever less later."""
SMALLEST_SCALE = 1e-3
"""Least RMS of a weight to which its step is in proportion, so that a layer that starts at zero moves."""


class Adafactor(torch.optim.Optimizer):
    """A kernel is the matrix (out, in * height * width), as for Muon; torch's would factor its 3 x 3 taps.

    The second moment of a matrix is the product of its rows' and columns' means over their mean; that of a vector is
    held whole. A step is clipped to an RMS of 1 and in proportion to the RMS of the weight. State: `rows`
    (out, 1, ...) and `columns` (1, in, ...), so it depends on no layout in memory and is shared out as the weight is
    where that is sharded; `squares`, in the shape of a vector; `step`. No number is read from the device.
    Source: Shazeer & Stern (2018) algorithms 4 to 6, without momentum, with the constants of `torch.optim.Adafactor`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float) -> None:
        """groups: weights, each with its weight_decay. lr: the step is this, or 1 / sqrt(step) if that is smaller."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - none is ever passed
        """One step, at the learning rate that the groups have now."""
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
    """How many numbers Adafactor remembers of a weight, the count of its steps apart."""
    return weight.shape[0] + weight[0].numel() if weight.ndim >= 2 else weight.numel()


def _second_moment(state: dict[str, Any], gradient: Tensor, share: float) -> Tensor:
    """The average of the gradient's squares, of which this one's have a `share`: a new tensor in its shape."""
    if gradient.ndim < 2:
        return _average(state, "squares", gradient.square(), share).clone()
    rest = tuple(range(1, gradient.ndim))
    rows = _average(state, "rows", _mean_square(gradient, rest), share)
    columns = _average(state, "columns", _mean_square(gradient, (0,)), share)
    return rows * columns / rows.mean(dim=0, keepdim=True).clamp(min=torch.finfo(rows.dtype).eps)


def _average(state: dict[str, Any], name: str, value: Tensor, share: float) -> Tensor:
    """The running average `name`, moved towards `value` by a share, which is 1 in the first step."""
    state[name] = state[name].lerp_(value, share) if name in state else value
    average: Tensor = state[name]
    return average


def _mean_square(gradient: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of the squares over these dimensions, which stay with a length of 1; no tensor of the squares is made."""
    count = math.prod(gradient.shape[dim] for dim in dims)
    return torch.linalg.vector_norm(gradient, dim=dims, keepdim=True).square() / count


def _rms(tensor: Tensor) -> Tensor:
    """Root of the mean square, a tensor of no dimensions."""
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())
