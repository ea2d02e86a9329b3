"""The optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from cascade.config.training import OptimizerConfig
from cascade.errors import CascadeError, quoted
from cascade.models.network import Network
from cascade.training.weights import is_sharded, spread_like

# --- adafactor -------------------------------------------------------------------------------------------------------
# Adafactor: an adaptive optimizer that stores only row and column means of a matrix's squared gradients.

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


# --- optim -----------------------------------------------------------------------------------------------------------


def build_optimizer(network: Network, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer; weight decay acts on matrices and kernels, not on biases and norms."""
    if config.kind == "muon":
        return Muon(network, config)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    match config.kind:
        case "adamw":
            return AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        case "adafactor":
            return Adafactor(groups, lr=config.learning_rate)
        case "schedule_free":
            optimizer = _package("schedulefree").AdamWScheduleFree(groups, config.learning_rate, config.betas)
            optimizer.train()  # and never `eval`: the network keeps the weights at which gradients are taken
            return optimizer
        case "prodigy":
            with redirect_stdout(io.StringIO()):  # it says that weight decay is decoupled
                return _package("prodigyopt").Prodigy(
                    groups,
                    config.learning_rate,
                    config.betas,
                    use_bias_correction=True,
                    safeguard_warmup=config.warmup_steps > 0,
                )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CascadeError(
            f"training.optimizer.kind: needs {name}: pip install 'cascade-diffusion[optimizers]'"
        ) from None


# --- the optimizers of the extra ---
# schedulefree and prodigyopt keep numbers of their own beside the state of the weights, equal in every group.

_OWN_NUMBERS = {"k": int, "weight_sum": float, "lr_max": float, "d": float, "d_max": float, "d_numerator": float}
"""Names in the groups, and their types."""


def averaged_weights(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor] | None:
    """The weights that schedule-free AdamW has averaged, by name, which draw; None for all other optimizers.

    The network has y = (1 - beta_1) z + beta_1 x, at which gradients are taken, and the state z, which moves; x is the
    average (Defazio et al. 2024, eq. 1 to 3).
    """
    if not _is_schedule_free(optimizer):
        return None
    beta = optimizer.param_groups[0]["betas"][0]
    averages = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            z = optimizer.state.get(parameter, {}).get("z", parameter.detach())  # none yet: it had no gradient
            averages[name] = torch.lerp(parameter.detach(), z, 1 - 1 / beta)
    return averages


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return "weight_sum" in optimizer.param_groups[0]


def _is_prodigy(optimizer: torch.optim.Optimizer) -> bool:
    return "d_numerator" in optimizer.param_groups[0]


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with every tensor passed in its memory order.

    The fused CPU kernel traverses weights, gradients and moments by address, and first makes an unused contiguous copy
    of each channels-last gradient: a tenth of a step of a network with 30 million parameters. A gradient whose layout
    differs from its weight's would be applied to the wrong elements, so it is copied to that layout.
    """

    def _init_group(self, group: dict[str, Any], *collected: list[Tensor]) -> bool:
        """Collects weights, gradients, first and second moments, their maxima and step counts, in this order."""
        is_complex: bool = super()._init_group(group, *collected)  # type: ignore[no-untyped-call]
        weights, gradients, first, second = collected[:4]
        if not weights or weights[0].device.type != "cpu":
            return is_complex
        orders = [_memory_order(weight) for weight in weights]
        for tensors in (weights, gradients, first, second):
            tensors[:] = [
                tensor if order is None else tensor.permute(order)
                for tensor, order in zip(tensors, orders, strict=True)
            ]
        gradients[:] = [
            gradient if order is None else gradient.contiguous()
            for gradient, order in zip(gradients, orders, strict=True)
        ]
        # A copy of a moment would be updated instead of the moment, and lost.
        moments = zip(first + second, orders * 2, strict=True)
        assert all(order is None or moment.is_contiguous() for moment, order in moments), "not laid out as its weight"
        return is_complex


def _memory_order(weight: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which the weight is contiguous; None if it is sharded or has no such order."""
    if is_sharded(weight):
        return None
    order = tuple(sorted(range(weight.ndim), key=weight.stride, reverse=True))
    return order if weight.permute(order).is_contiguous() else None


class Muon(torch.optim.Optimizer):
    """torch's Muon for the kernels and matrices of the repeated blocks, AdamW for everything else.

    A kernel is flattened to (out, in * height * width), one row for each output channel (Jordan et al. 2024). Muon's
    update is scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so both use one learning rate. `state` is
    keyed by the network's parameters, in their shape, as for any optimizer.
    """

    def __init__(self, network: Network, config: OptimizerConfig) -> None:
        learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
        repeated = {parameter for block in network.repeated_blocks() for parameter in block.parameters()}
        hidden = [parameter for parameter in learning if parameter.ndim >= 2 and parameter in repeated]
        chosen = set(hidden)
        others = [parameter for parameter in learning if parameter not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": hidden, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate})
        self._matrices = {parameter: _as_matrix(parameter.detach()) for parameter in hidden}
        # torch.optim.Muon refuses an empty list; networks without repeated layers use only AdamW.
        self._muon = torch.optim.Muon(list(self._matrices.values()), adjust_lr_fn="match_rms_adamw") if hidden else None
        self._adamw = AdamW(self.param_groups[1:], lr=config.learning_rate, betas=config.betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - none is ever passed
        """One step of both optimizers, at the current learning rate of the groups."""
        if self._muon is not None:
            for parameter, matrix in self._matrices.items():
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                matrix.grad = None if parameter.grad is None else _as_matrix(parameter.grad)
                self._muon.state[matrix] = {"momentum_buffer": _as_matrix(state["momentum_buffer"])}
            self._muon.param_groups[0].update({key: self.param_groups[0][key] for key in ("lr", "weight_decay")})
            self._muon.step()
            for matrix in self._matrices.values():
                matrix.grad = None
        self._adamw.state = self.state  # `load_state_dict` replaces the dict
        for group, own in zip(self._adamw.param_groups, self.param_groups[1:], strict=True):
            group["lr"] = own["lr"]
        self._adamw.step()


def _as_matrix(tensor: Tensor) -> Tensor:
    """(out, ...) -> (out, rest), a view of the same memory in any layout.

    The order within a row depends on the layout; Muon's step does not depend on that order.
    """
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels-last
    return tensor.flatten(1)


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
    """Set the learning rate in every group; a tensor stays a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `<parameter>::<quantity>`, for safetensors; own numbers as `::<name>`."""
    group = optimizer.param_groups[0]
    own = _OWN_NUMBERS.keys() & group.keys() if _is_schedule_free(optimizer) or _is_prodigy(optimizer) else ()
    state = {f"::{name}": torch.tensor(float(group[name]), dtype=torch.float64) for name in sorted(own)}
    for name, parameter in network.named_parameters():
        for quantity, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                number = float(value) if isinstance(value, int) else value
                state[f"{name}::{quantity}"] = torch.as_tensor(number)
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore `optimizer_state`; the learning rate follows from the step and is not saved.

    Raises CascadeError for tensors that this optimizer does not have.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, quantity = key.partition("::")
        kept.setdefault(name, {})[quantity] = value
    for quantity, value in kept.pop("", {}).items():
        if quantity not in _OWN_NUMBERS or value.numel() != 1:
            raise CascadeError(f"the optimizer's state has {quoted(quantity)}, which no optimizer keeps")
        for group in optimizer.param_groups:
            group[quantity] = _OWN_NUMBERS[quantity](value.item())
    for name, parameter in network.named_parameters():
        own = kept.get(name)
        if own:
            _check_state(optimizer, name, parameter, own)
            fused = isinstance(
                optimizer, torch.optim.AdamW | Muon
            )  # its kernel needs the step count on the weights' device
            optimizer.state[parameter] = {
                quantity: value if quantity == "step" and not fused else _placed_like(parameter, value)
                for quantity, value in own.items()
            }
            if _is_prodigy(optimizer):
                optimizer.state[parameter]["step"] = int(own["step"])


def _check_state(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, own: dict[str, Tensor]) -> None:
    expected = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set(own)
    if own.keys() != expected:
        raise CascadeError(f"the optimizer's state of {name} has {sorted(own)}; expected {sorted(expected)}")
    for quantity, value in own.items():
        shape = () if quantity == "step" else parameter.shape
        if not value.is_floating_point():
            raise CascadeError(f"the optimizer's state of {name}: {quantity} is {value.dtype}; expected a float")
        if isinstance(optimizer, torch.optim.AdamW) and value.shape != shape:
            raise CascadeError(
                f"the optimizer's state of {name}: {quantity} has shape {list(value.shape)}, expected {list(shape)}"
            )


def _placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The value on the parameter's device and, if the shapes are equal, in its memory layout.

    Fused AdamW traverses both by address: in another layout than channels-last it would mix up the elements.
    """
    if is_sharded(parameter) and value.ndim:
        return spread_like(parameter.detach(), value)
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
