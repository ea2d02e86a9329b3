"""An average of the weights over the recent past, which draws better than the weights of the moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from cascade.config.training import EMAConfig
from cascade.training.sharding import spread_like, whole


class EMA:
    """Exponential moving average in float32 of the weights that learn, its memory measured in pictures, not in steps.

    So a run with twice the batch averages over the same data (Karras et al. 2024, sec. 3). Frozen weights are their own
    average, and may be nearly all of a network.
    """

    def __init__(self, network: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.weights = {name: value.float().clone() for name, value in _learning(network).items()}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at the step that brings the pictures seen to `images_seen`."""
        half_life = float(self.config.half_life_images)
        if self.config.warmup:
            half_life = min(half_life, 0.2 * images_seen)
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Take the weights of the moment into the average."""
        fresh = [weight.float() for weight in _learning(network).values()]
        share = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.weights.values()), fresh, share)

    @torch.no_grad()
    def distance(self, network: nn.Module) -> float:
        """How far the average lies from the weights that learn, as a share of their norm. All processes together.

        One weight after the other: no more than one difference is in memory.
        """
        weights = _learning(network).values()
        apart = _norm(weight.float() - mean for weight, mean in zip(weights, self.weights.values(), strict=True))
        return apart / max(_norm(weight.float() for weight in weights), 1e-12)

    def of_all(self, network: nn.Module) -> dict[str, Tensor]:
        """The average of every weight, in the network's order; frozen ones are the network's own."""
        return {name: self.weights.get(name, value.detach()) for name, value in network.named_parameters()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from a saved average, which may hold more weights than those that learn."""
        for name, value in self.weights.items():
            value.copy_(spread_like(value, weights[name]))


def _learning(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all together."""
    return float(torch.stack([whole(torch.linalg.vector_norm(tensor)) for tensor in tensors]).norm())
