"""Layers that read conditions: classes, numbers and vectors join the noise level, pictures the first feature map.

The last layer of each starts at zero, and so do the nulls: a condition that is added to a trained stage changes no bit
of its pictures until it is trained. Source: the zero convolutions of ControlNet (Zhang et al. 2023) sec. 3.1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Given
from cascade.conditions import (
    ClassCondition,
    ConditionConfig,
    Conditions,
    NumberCondition,
    PictureCondition,
    VectorCondition,
)
from cascade.models.blocks import space_to_depth, zero_init


class Reader(nn.Module):
    """One condition -> a vector (B, W), or features (B, W, h, w); its null where there is no value."""

    def __init__(self, config: ConditionConfig, width: int) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(width)) if config.null == "learned" else None

    @abstractmethod
    def read(self, value: Tensor) -> Tensor:
        """See `Given.value`."""

    def forward(self, given: Given) -> Tensor:
        """The null stays in the graph of every batch, as training in several processes requires."""
        seen = self.read(given.value)
        grid = [1] * (seen.ndim - 2)  # of a feature map
        null = torch.zeros_like(seen) if self.null is None else self.null.view(1, -1, *grid).to(seen.dtype)
        return torch.where(given.present.view(-1, 1, *grid), seen, null)


class ClassReader(Reader):
    """A row of a table for each label."""

    def __init__(self, config: ClassCondition, width: int) -> None:
        super().__init__(config, width)
        self.table = nn.Embedding(len(config.labels), width)
        nn.init.zeros_(self.table.weight)

    def read(self, value: Tensor) -> Tensor:
        """(B,) int64 -> (B, W)."""
        return self.table(value)


class NumberReader(Reader):
    """Fourier features through an MLP (Tancik et al. 2020)."""

    def __init__(self, config: NumberCondition, width: int) -> None:
        super().__init__(config, width)
        self.octaves = config.octaves
        self.hidden = nn.Linear(2 * config.octaves + 1, width)
        self.out = zero_init(nn.Linear(width, width))

    def read(self, value: Tensor) -> Tensor:
        """(B,) float32 in [0, 1] -> (B, W)."""
        places = math.pi * 2.0 ** torch.arange(self.octaves, device=value.device)
        angle = value.float()[:, None] * places  # (B, octaves)
        features = torch.cat([2 * value.float()[:, None] - 1, angle.sin(), angle.cos()], dim=1)
        return self.out(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


class VectorReader(Reader):
    """An MLP."""

    def __init__(self, config: VectorCondition, width: int) -> None:
        super().__init__(config, width)
        self.hidden = nn.Linear(config.dim, width)
        self.out = zero_init(nn.Linear(width, width))

    def read(self, value: Tensor) -> Tensor:
        """(B, D) -> (B, W)."""
        return self.out(F.silu(self.hidden(value.to(self.hidden.weight.dtype))))


class PictureReader(Reader):
    """Two convolutions on the grid of the network's first feature map, to which their output is added.

    This equals more input channels of the network's first layer, except that its weights keep their shape.
    """

    def __init__(self, config: PictureCondition, width: int, patch: int) -> None:
        super().__init__(config, width)
        self.labels, self.patch = config.labels, patch
        self.hidden = nn.Conv2d(config.seen_channels * patch**2, config.hidden, 3, padding=1)
        self.out = zero_init(nn.Conv2d(config.hidden, width, 3, padding=1))

    def read(self, value: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, W, H / patch, W / patch)."""
        dtype = self.hidden.weight.dtype
        if self.labels:
            pixels = F.one_hot(value[:, 0].long(), self.labels).permute(0, 3, 1, 2).to(dtype)
        else:
            pixels = (value.float() / 127.5 - 1).to(dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.out(F.silu(self.hidden(space_to_depth(pixels, self.patch))))


class ConditionReaders(nn.ModuleDict):
    """The readers of a stage's conditions, `of_NAME` each: a plain name might be one of the class' own attributes."""

    def __init__(self, conditions: Conditions, embedding_dim: int, width: int, patch: int) -> None:
        """embedding_dim: of the noise level. width, patch: of the network's first feature map."""
        super().__init__({key_of(name): _reader(conditions[name], embedding_dim, width, patch) for name in conditions})

    def forward(self, given: Mapping[str, Given]) -> tuple[Tensor | None, Tensor | None]:
        """(sum of the vectors (B, E), sum of the features (B, W, h, w)); None without any.

        Raises ValueError when a condition is missing.
        """
        vectors, features = list[Tensor](), list[Tensor]()
        for key, reader in self.items():
            name = key.removeprefix(_PREFIX)
            if name not in given:
                raise ValueError(f"condition {name} is missing among those of the network's call")
            (features if isinstance(reader, PictureReader) else vectors).append(reader(given[name]))
        return _sum(vectors), _sum(features)


_PREFIX = "of_"


def key_of(name: str) -> str:
    """The name of a condition's reader among the network's parts."""
    return f"{_PREFIX}{name}"


def _sum(parts: list[Tensor]) -> Tensor | None:
    return None if not parts else torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _reader(config: ConditionConfig, embedding_dim: int, width: int, patch: int) -> Reader:
    match config:
        case ClassCondition():
            return ClassReader(config, embedding_dim)
        case NumberCondition():
            return NumberReader(config, embedding_dim)
        case VectorCondition():
            return VectorReader(config, embedding_dim)
        case PictureCondition():
            return PictureReader(config, width, patch)
