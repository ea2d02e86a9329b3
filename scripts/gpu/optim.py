"""An optimizer and weight averages for one device: few large kernels, no synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
MOMENTUM = 0.95


class Muon:
    """Muon for the matrices and kernels of the repeated layers, batched by shape; AdamW for the others.

    A kernel is a matrix (out, in height width), and an update has the size of AdamW's: the rule of
    `cascade.training.optim.Muon`, which processes one matrix at a time.
    Source: Jordan et al. (2024); Liu et al. (2025) section 2.2.
    """

    def __init__(self, network: nn.Module, weight_decay: float = 0.01) -> None:
        named = list(network.named_parameters())
        hidden = [p for name, p in named if p.ndim >= 2 and name.split(".")[0] in ("levels", "middle")]
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in hidden:
            shapes.setdefault((parameter.shape[0], parameter[0].numel()), []).append(parameter)
        self.groups = [(own, torch.zeros(len(own), *shape, device=own[0].device)) for shape, own in shapes.items()]
        chosen = {id(p) for p in hidden}
        self.others = [p for _, p in named if id(p) not in chosen]
        fused = self.others[0].is_cuda
        self.adamw = torch.optim.AdamW(self.others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step; AdamW's is half as long."""
        for own, momentum in self.groups:
            gradient = torch.stack([p.grad.reshape(p.shape[0], -1) for p in own]).float()  # type: ignore[union-attr]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            updates = orthogonal(torch.lerp(gradient, momentum, MOMENTUM)) * (0.2 * max(momentum.shape[1:]) ** 0.5)
            for parameter, update in zip(own, updates, strict=True):
                parameter.mul_(1 - learning_rate * self.weight_decay)
                parameter.add_(update.reshape(parameter.shape), alpha=-learning_rate)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate / 2
        self.adamw.step()

    def forget(self) -> None:
        """Reset the optimizer's state."""
        for _, momentum in self.groups:
            momentum.zero_()
        self.adamw.state.clear()


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns): the nearest matrices whose singular values are about 1, by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    u = matrices.mT if tall else matrices
    u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
    u = u.bfloat16() if u.is_cuda or torch.cpu._is_avx512_bf16_supported() else u
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = u @ u.mT
        u = a * u + (b * gram + c * gram @ gram) @ u
    return (u.mT if tall else u).float()


class Average:
    """Average of weights that count by a power of the step: (t / T)^power (Karras et al. 2024, EDM2, section 3.1).

    std: its width as a share of the run, from which the power follows.
    """

    def __init__(self, parameters: Sequence[Tensor], std: float) -> None:
        self.power = float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())
        self.mean, self.count = [p.detach().clone() for p in parameters], 0

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        self.count += 1
        weight = 1 - (1 - 1 / self.count) ** (self.power + 1)
        torch._foreach_lerp_(self.mean, [p.detach() for p in parameters], weight)
