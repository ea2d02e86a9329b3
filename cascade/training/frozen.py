"""Freezing parts of a network by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cascade.errors import CascadeError
from cascade.models.blocks import Normalize
from cascade.quoting import quoted


def freeze(network: nn.Module, patterns: Sequence[str], trained: Sequence[str] = ()) -> None:
    """Disable the gradients of all weights whose name, or the name of a module around them, matches a pattern.

    `levels.0` is a module and everything in it, `*.attention` every module of that name, `*.bias` every bias. trained:
    patterns of weights that get gradients nevertheless. Raises CascadeError for a pattern that matches nothing, and
    when nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for setting, each, learns in (("frozen", patterns, False), ("trained", trained, True)):
        for pattern in each:
            matched = [name for name in parameters if any(fnmatchcase(part, pattern) for part in _around(name))]
            if not matched:
                raise CascadeError(
                    f"training.{setting}: {quoted(pattern)} matches no weight; {_near(pattern, list(parameters))}"
                )
            for name in matched:
                parameters[name].requires_grad_(learns)
    if patterns:
        for module in network.modules():
            if isinstance(module, Normalize | nn.GroupNorm):
                module.register_forward_pre_hook(_with_gradient)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise CascadeError(f"training.frozen: {list(patterns)} leaves nothing to train; name fewer parts")


def _with_gradient(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A norm's input marked to require a gradient, although nothing before it is trained.

    Otherwise the backward pass of GroupNorm on a channels-last picture crashes the process (torch 2.13 on a CPU: it
    writes the gradient that is not required).
    """
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _around(name: str) -> list[str]:
    """`levels.0.down.weight` -> `levels`, `levels.0`, `levels.0.down`, and itself."""
    steps = name.split(".")
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def _near(pattern: str, names: Sequence[str]) -> str:
    parts = list(dict.fromkeys(part for name in names for part in _around(name)))
    close = difflib.get_close_matches(pattern, parts, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the parts are {', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"
