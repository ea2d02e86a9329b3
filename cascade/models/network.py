"""What a stage asks of its network, whichever it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, Self

from torch import nn

from cascade.conditioning import Conditioning


class Prepared(Protocol):
    """What a network computes once for all noise levels, from the conditions alone."""

    def crop(self, rows: slice, columns: slice) -> Self:
        """The same for a part of the picture: images among the conditions are cropped, all else is kept."""


class Network(nn.Module):
    """(z, log SNR, conditions) -> output.

    `forward(z, log_snr, cond)` takes z (B, C, H, W), log_snr (B, 1, 1, 1), and conditions as they are or prepared; it
    gives (B, C', H, W), of which channels beyond those of z say where the variance lies.
    """

    activation_checkpointing: bool = False
    """Whether a training step recomputes activations in its backward pass."""

    @abstractmethod
    def prepare(self, cond: Conditioning) -> Prepared:
        """Everything that depends on the conditions alone. Raises ValueError for conditions that do not fit."""
