"""Low-rank adaptation: the weights stay, and the attention's linear layers learn a small difference.

Source: Hu et al. (2021) arXiv 2106.09685. Written on torch's parametrizations, so a network knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade.models.attention import Attention
from cascade.models.if_blocks import IFAttention

_ORIGINAL = ".parametrizations.weight.original"


class LowRank(nn.Module):
    """weight + up @ down, of the given rank; at first nothing is added."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, columns) -> (rows, columns)."""
        return weight + self.up @ self.down


def add_low_rank(network: nn.Module, rank: int, seed: int = 0) -> None:
    """Freeze all weights of a network and let those of its attention learn a difference of this rank."""
    network.requires_grad_(False)
    layers = [
        layer
        for attention in network.modules()
        if isinstance(attention, Attention | IFAttention)
        for layer in attention.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank).to(layer.weight))


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named weights with their differences added in, under the names that the network had before."""
    plain = {}
    for name, weight in weights.items():
        if name.endswith(_ORIGINAL):
            layer = name.removesuffix(_ORIGINAL)
            up, down = (weights[f"{layer}.parametrizations.weight.0.{part}"] for part in ("up", "down"))
            plain[f"{layer}.weight"] = weight + up @ down
        elif ".parametrizations." not in name:
            plain[name] = weight
    return plain
