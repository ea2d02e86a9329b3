"""Conditions of cascade's own networks, prepared once per generation: one vector, and keys and values of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.conditions import Conditions
from cascade.models.attention import KeysValues
from cascade.models.conditions import ConditionReaders
from cascade.models.embeddings import NoiseLevelEmbedding, TextPooling
from cascade.models.network import Network, check_conditions

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
