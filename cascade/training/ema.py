"""Moving average of the weights, which draws better than the current weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from cascade.config.training import EMAConfig
from cascade.training.sharding import spread_like, whole


class EMA:
    """Exponential moving average in float32 of the trained weights, with a half-life in pictures instead of steps.

    A run with twice the batch size thus averages over the same data (Karras et al. 2024, sec. 3). Frozen weights, which
    may be most of a network, need no average.
    """

    def __init__(self, network: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.weights = {name: value.float().clone() for name, value in _learning(network).items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at the step after which `images_seen` pictures have been seen."""
        half_life = float(self.config.half_life_images)
        if self.config.warmup:
            half_life = min(half_life, 0.2 * images_seen)
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Add the current weights to the average."""
        fresh = [weight.float() for weight in _learning(network).values()]
        share = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.weights.values()), fresh, share)

    @torch.no_grad()
    def distance(self, network: nn.Module) -> float:
        """Distance of the average from the trained weights, relative to their norm. All processes together.

        Computed one weight at a time, so that only one difference is in memory.
        """
        weights = _learning(network).values()
        apart = _norm(weight.float() - mean for weight, mean in zip(weights, self.weights.values(), strict=True))
        return apart / max(_norm(weight.float() for weight in weights), 1e-12)

    def of_all(self, network: nn.Module) -> dict[str, Tensor]:
        """The average of every weight, in the network's order; for frozen ones the weight itself."""
        return {name: self.weights.get(name, value.detach()) for name, value in network.named_parameters()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a saved average, which may hold more than the trained weights."""
        for name, value in self.weights.items():
            value.copy_(spread_like(value, weights[name]))


def _learning(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return float(torch.stack([whole(torch.linalg.vector_norm(tensor)) for tensor in tensors]).norm())
