"""Everything a network may see in addition to the noisy picture and its noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from cascade.transfer import on_device

NULL_TEXT = ""
"""The text that stands for no text; classifier-free guidance extrapolates away from its embedding."""


@dataclass(frozen=True)
class Given:
    """The values of one condition other than text; see `cascade.conditions`.

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
