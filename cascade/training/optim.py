"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cascade.config import OptimizerConfig


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or Adafactor; weight decay acts on matrices and kernels, not on biases and norms."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    match config.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=config.learning_rate)


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up, constant, then a fall that would reach 0 at `steps`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay == "constant":
        return config.learning_rate * warmup
    length = config.decay_steps or steps - config.warmup_steps
    progress = min(max((step - (steps - length)) / max(length, 1), 0.0), 1.0)
    fall = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * warmup * fall


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it in every group; a tensor stays a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's memory as named tensors, `<parameter>::<quantity>`, which safetensors can hold."""
    state = {}
    for name, parameter in network.named_parameters():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                state[f"{name}::{quantity}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module, state: dict[str, Tensor]) -> None:
    """Continue from `optimizer_state`; the learning rate is set by the step and not kept."""
    for name, parameter in network.named_parameters():
        own = {key.split("::")[1]: value for key, value in state.items() if key.split("::")[0] == name}
        if own:
            fused = isinstance(optimizer, torch.optim.AdamW)  # its kernel wants the step count beside the weights
            optimizer.state[parameter] = {
                quantity: value if quantity == "step" and not fused else _beside(parameter, value)
                for quantity, value in own.items()
            }


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """On the parameter's device and, where it has its shape, in its memory layout.

    Fused AdamW walks both by address: in another layout (ours is channels-last) it would mix up the elements.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
