"""Everything a network may see in addition to the noisy picture and its noise level: texts and smaller pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from cascade.system.transfer import on_device

NULL_TEXT = ""
"""The text that stands for no text; classifier-free guidance extrapolates away from its embedding."""


@dataclass(frozen=True)
class Given:
    """The values of one condition other than text; see `cascade.conditions.settings`.

    value: a class (B,) int64; a number (B,) float32, 0 to 1 over its range; a vector (B, D); a picture (B, C, H, W)
    uint8. present: (B,) bool; where it is False, the value does not count and the condition's null takes its place.
    """

    value: Tensor
    present: Tensor

    def without(self) -> Given:
        """The null in every row."""
        return replace(self, present=torch.zeros_like(self.present))


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch of B pictures.

    text: (B, N, D) token embeddings; text_mask: (B, N) bool, True where a token is real.
    low_res: (B, 3, h, w) in [-1, 1], the smaller picture, already noised; None for a base stage.
    low_res_log_snr: (B, 1, 1, 1), how much noise `low_res` carries, in the coordinate of the diffusion itself.
    given: the stage's other conditions, by name.
    """

    text: Tensor
    text_mask: Tensor
    low_res: Tensor | None = None
    low_res_log_snr: Tensor | None = None
    given: Mapping[str, Given] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.text.shape[0]

    def joined(self, other: Conditioning) -> Conditioning:
        """This batch followed by another, so that guidance evaluates conditions and null conditions in one call."""
        return concatenate([self, other])

    def with_text(self, text: Tensor, text_mask: Tensor) -> Conditioning:
        """The same picture conditions with another text, such as the null text or a negative prompt."""
        return replace(self, text=text, text_mask=text_mask)

    def without(self, names: Sequence[str] | None = None) -> Conditioning:
        """The same with the nulls of some conditions, default all; text and the smaller picture stay."""
        if not self.given:
            return self
        changed = self.given if names is None else names
        return replace(
            self, given={name: one.without() if name in changed else one for name, one in self.given.items()}
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move everything to `device`; cast text and pictures, but never the log SNR, to `dtype`."""
        moved: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "given":  # readers cast their values themselves
                moved[each.name] = {
                    name: Given(on_device(one.value, device), on_device(one.present, device))
                    for name, one in value.items()
                }
                continue
            if value is not None:
                keep = each.name in ("text_mask", "low_res_log_snr")
                value = on_device(value, device).to(value.dtype if keep or dtype is None else dtype)
            moved[each.name] = value
        return Conditioning(**moved)


def concatenate(conditions: Sequence[Conditioning]) -> Conditioning:
    """Join batches of conditions; shorter texts are padded with masked tokens."""
    longest = max(condition.text.shape[1] for condition in conditions)
    padded = [pad_text(condition.text, condition.text_mask, longest) for condition in conditions]
    return Conditioning(
        text=torch.cat([text for text, _ in padded]),
        text_mask=torch.cat([mask for _, mask in padded]),
        low_res=_cat([condition.low_res for condition in conditions]),
        low_res_log_snr=_cat([condition.low_res_log_snr for condition in conditions]),
        given={name: _joined([condition.given[name] for condition in conditions]) for name in conditions[0].given},
    )


def _joined(parts: Sequence[Given]) -> Given:
    return Given(torch.cat([part.value for part in parts]), torch.cat([part.present for part in parts]))


def pad_text(text: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Append masked zero tokens until the text has `length` of them: (B, length, D), (B, length)."""
    missing = length - text.shape[1]
    if missing == 0:
        return text, mask
    return torch.nn.functional.pad(text, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    assert len(present) == len(parts), "either every batch of conditions has a smaller picture or none has"
    return torch.cat(present)


# --- embeddings ------------------------------------------------------------------------------------------------------
# Token embeddings of prompts with their mask, and the interface of text encoders.

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
