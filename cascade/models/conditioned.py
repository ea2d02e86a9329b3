"""Conditions of cascade's own networks, prepared once per generation: one vector, and keys and values of the text."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import Conditioning, Given
from cascade.conditions.settings import (
    ClassCondition,
    ConditionConfig,
    Conditions,
    NumberCondition,
    PictureCondition,
    VectorCondition,
)
from cascade.models.attention import KeysValues
from cascade.models.blocks import space_to_depth, zero_init
from cascade.models.network import Network, check_conditions

# --- embeddings ------------------------------------------------------------------------------------------------------
# Embeddings that every block reads: the noise level and the pooled text.

SHORTEST_PERIOD = 0.5
LONGEST_PERIOD = 160.0
"""Range of the sinusoids' periods, in units of log SNR: a fine step of a sampler to four times the clipped range."""


def sinusoidal(log_snr: Tensor, width: int) -> Tensor:
    """Sine and cosine of log SNR at geometrically spaced periods: (B, 1, 1, 1) -> (B, width).

    Source: Vaswani et al. (2017) sec. 3.5, in log SNR in place of a step number.
    """
    half = width // 2
    ratio = torch.arange(half, device=log_snr.device, dtype=torch.float32) / max(half - 1, 1)
    frequency = 2 * math.pi / (SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** ratio)
    angle = log_snr.float().flatten()[:, None] * frequency  # (B, half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class NoiseLevelEmbedding(nn.Module):
    """Sinusoids of log SNR through an MLP of two layers (Prince 2023, sec. 18.6.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B, 1, 1, 1) -> (B, width)."""
        features = sinusoidal(log_snr, self.width).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features)))


class TextPooling(nn.Module):
    """Attention-pooled text: the masked mean of the tokens is the query, that mean and the tokens are keys and values.

    Source: Imagen (Saharia et al. 2022) sec. D.1, with the class token of GLIDE and DeepFloyd IF. The mean is always
    among the keys, so a text with no real token gives a finite vector.
    """

    def __init__(self, text_dim: int, width: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = max(text_dim // head_dim, 1)
        inner = self.heads * head_dim
        self.query = nn.Linear(text_dim, inner)
        self.key_value = nn.Linear(text_dim, 2 * inner)
        self.out = nn.Sequential(nn.Linear(inner, width), nn.LayerNorm(width))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """text: (B, N, D) normalized; mask: (B, N) bool -> (B, width)."""
        counted = mask[:, :, None].to(text.dtype)
        mean = (text * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)  # (B, 1, D)
        tokens = torch.cat([mean, text], dim=1)  # (B, 1 + N, D)
        visible = F.pad(mask, (1, 0), value=True)[:, None, None, :]  # (B, 1, 1, 1 + N)
        query = _split(self.query(mean), self.heads)  # (B, heads, 1, d)
        key, value = (_split(part, self.heads) for part in self.key_value(tokens).chunk(2, dim=-1))
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.out(pooled.transpose(1, 2).flatten(1))


def _split(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- conditions by name ----------------------------------------------------------------------------------------------
# Layers that read conditions: classes, numbers and vectors join the noise level, pictures the first feature map.
#
# The last layer of each starts at zero, and so do the nulls: a condition that is added to a trained stage changes no
# bit of its pictures until it is trained. Source: the zero convolutions of ControlNet (Zhang et al. 2023) sec. 3.1.


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


# --- conditioned -----------------------------------------------------------------------------------------------------

TextUse = Literal["attention", "pooled", "none"]
"""`attention`: tokens join the keys and values, pooled text joins the embedding. `pooled`: the embedding only."""


@dataclass(frozen=True)
class Seen:
    """Conditions prepared for a network.

    embedding: (B, E) from pooled text and augmentation level. text: keys and values for each block, in order; None for
    a block that reads no text. visible: (B, 1, 1, N), None when all tokens are real. low_res: (B, C, H, W), upsampled.
    """

    embedding: Tensor
    text: tuple[KeysValues | None, ...]
    visible: Tensor | None
    low_res: Tensor | None
    features: Tensor | None = None
    patch: int = 1

    def crop(self, rows: slice, columns: slice) -> Seen:
        """The same conditions for a part of the picture."""
        low_res, features = self.low_res, self.features
        if low_res is not None:
            low_res = low_res[:, :, rows, columns]
        if features is not None:
            features = features[:, :, _shrunk(rows, self.patch), _shrunk(columns, self.patch)]
        return replace(self, low_res=low_res, features=features)


class ConditionedNetwork(Network):
    """A network in which every block reads one vector: noise level, pooled text and augmentation level combined."""

    def __init__(self, embedding_dim: int, text: TextUse, text_dim: int, low_res_channels: int) -> None:
        super().__init__()
        self.low_res_channels = low_res_channels
        self.embedding_dim = embedding_dim
        self.conditions: ConditionReaders | None = None
        self.noise_level = NoiseLevelEmbedding(embedding_dim)
        self.aug_level = NoiseLevelEmbedding(embedding_dim) if low_res_channels else None
        self.text_norm = nn.LayerNorm(text_dim) if text != "none" else None
        self.text_pooling = TextPooling(text_dim, embedding_dim) if text != "none" else None

    @abstractmethod
    def read_text(self, text: Tensor | None) -> Sequence[KeysValues | None]:
        """Keys and values of normalized text (B, N, D) for each block, in the order of `forward`.

        None for a block that reads no text, and for every block when `text` is None.
        """

    @property
    @abstractmethod
    def first_map(self) -> tuple[int, int]:
        """Channels of the first feature map, and the factor by which it is smaller than the picture."""

    def add_conditions(self, conditions: Conditions) -> None:
        """See `Network.add_conditions`."""
        self.conditions = ConditionReaders(conditions, self.embedding_dim, *self.first_map)

    def prepare(self, cond: Conditioning) -> Seen:
        """Everything that depends on the conditions alone. cond.low_res: (B, C, H, W), already upsampled to z's size.

        Raises ValueError when a smaller picture is missing or not expected.
        """
        check_conditions(cond, self.low_res_channels)
        dtype = self.noise_level.out.weight.dtype
        embedding = torch.zeros((), device=cond.text.device, dtype=dtype)
        normalized = visible = None
        if self.text_norm is not None and self.text_pooling is not None:
            normalized = self.text_norm(cond.text.to(self.text_norm.weight.dtype))
            embedding = embedding + self.text_pooling(normalized, cond.text_mask)
            visible = None if _known_to_be_real(cond.text_mask) else cond.text_mask[:, None, None, :]
        if self.aug_level is not None:
            embedding = embedding + self.aug_level(cond.low_res_log_snr)
        features = None
        if self.conditions is not None:
            vectors, features = self.conditions(cond.given)
            embedding = embedding if vectors is None else embedding + vectors
        return Seen(embedding, tuple(self.read_text(normalized)), visible, cond.low_res, features, self.first_map[1])


def _shrunk(pixels: slice, patch: int) -> slice:
    return slice(pixels.start // patch, pixels.stop // patch)


def _known_to_be_real(mask: Tensor) -> bool:
    """Whether every token (B, N) is real; False where reading the mask would block on a GPU or break a graph."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
