"""Token embeddings of prompts with their mask, and the interface of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from cascade.conditioning import pad_text
from cascade.transfer import on_device

NullText = Literal["encoded", "zeros"]
"""The embedding of no text: the encoder's output for the empty prompt, or zeros, as in Imagen."""


@dataclass(frozen=True)
class TextEmbeddings:
    """The embeddings of B prompts.

    tokens: (B, N, D), zero where padded. mask: (B, N) bool, True where a token is real; padding comes last.
    """

    tokens: Tensor
    mask: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor]) -> Self:
        """Pad unpadded embeddings, each (n, D), to the longest: (B, N, D)."""
        assert rows, "no embeddings to pad"
        lengths = on_device(torch.tensor([len(row) for row in rows]), rows[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return cls(tokens, mask)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self) -> list[Tensor]:
        """Each prompt's embedding without padding: (n, D)."""
        lengths = self.mask.sum(dim=1).tolist()
        return [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    def select(self, indices: Sequence[int]) -> TextEmbeddings:
        """The prompts at `indices`, in that order, repeated if an index repeats; the padded length stays."""
        chosen = on_device(torch.as_tensor(indices, dtype=torch.long), self.tokens.device)
        return TextEmbeddings(self.tokens[chosen], self.mask[chosen])

    def padded(self, length: int) -> TextEmbeddings:
        """The same embeddings with masked zeros up to `length` tokens; `length` is at least N."""
        assert length >= self.tokens.shape[1], f"{self.tokens.shape[1]} tokens do not fit into {length}"
        return TextEmbeddings(*pad_text(self.tokens, self.mask, length))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """Move to `device`, and cast the tokens to `dtype`."""
        return TextEmbeddings(on_device(self.tokens, device).to(dtype), on_device(self.mask, device))


def join(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Several batches joined into one; shorter ones are padded with masked zeros."""
    longest = max(part.tokens.shape[1] for part in parts)
    padded = [part.padded(longest) for part in parts]
    return TextEmbeddings(torch.cat([part.tokens for part in padded]), torch.cat([part.mask for part in padded]))


class TextEncoderProtocol(Protocol):
    """An encoder of prompts: a `TextEncoder`, or a `CachedTextEncoder`."""

    @property
    def dim(self) -> int:
        """Width D of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the embeddings would."""

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:
        """The embeddings of `prompts`, in their order."""

    def to(self, device: torch.device | str | None = None) -> Self:
        """Move to `device`, where prompts are encoded from then on, and return this encoder."""

    def release(self) -> None:
        """Free the memory of the weights."""


class NoText:
    """The encoder of stages that read no text: one token of zeros for every prompt, without a model."""

    fingerprint = "none"

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._device: torch.device | str | None = None

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:  # noqa: ARG002 - the protocol's
        """Zeros (B, 1, D)."""
        tokens = torch.zeros(len(prompts), 1, self.dim, device=self._device)
        return TextEmbeddings(tokens, torch.ones(len(prompts), 1, dtype=torch.bool, device=self._device))

    def to(self, device: torch.device | str | None = None) -> Self:
        """Move to `device`."""
        self._device = device
        return self

    def release(self) -> None:
        """There is nothing to free."""
