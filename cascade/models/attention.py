"""Attention of a feature map's pixels: to all of them, with the text tokens joined, or to the text tokens alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.models.attend import attend
from cascade.models.blocks import Normalize, zero_init

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text, each (B, heads, N, d)."""


class Attention(nn.Module):
    """Every pixel asks; pixels and text tokens answer; the result is added to the feature map.

    Source: Imagen (Saharia et al. 2022) sec. D.1: text concatenated to the keys and values of self-attention; in its
    1024 stage, without `sees_picture`, text alone.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        text_dim: int | None,
        norm: str,
        groups: int,
        sees_picture: bool = True,
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.sees_picture = sees_picture
        self.norm = Normalize(channels, norm, groups)
        self.qkv = nn.Linear(channels, (3 if sees_picture else 1) * channels, bias=False)  # or the queries alone
        self.text_key_value = nn.Linear(text_dim, 2 * channels, bias=False) if text_dim else None
        self.out = zero_init(nn.Linear(channels, channels))

    def read_text(self, text: Tensor) -> KeysValues | None:
        """Keys and values of normalized text (B, N, D); they do not depend on the picture."""
        if self.text_key_value is None:
            return None
        key, value = self.text_key_value(text).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        return key, value

    def forward(self, h: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor:
        """h: (B, C, H, W); visible: (B, 1, 1, N) bool, None when every text token is real -> (B, C, H, W)."""
        batch, channels, height, width = h.shape
        tokens = self.norm(h).permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, HW, C)
        asked = self.qkv(tokens).unflatten(-1, (-1, channels // self.heads)).transpose(1, 2)  # (B, 1 or 3 heads, HW, d)
        query, *own = asked.split(self.heads, dim=1)
        answer = attend(query, *self._answers(own, text, visible))  # (B, heads, HW, d)
        update = self.out(answer.transpose(1, 2).flatten(2))  # (B, HW, C)
        return h + update.reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def _answers(
        self, own: list[Tensor], text: KeysValues | None, visible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, heads, N, d), and which of them are seen. own: those of the pixels, or none."""
        if not own:
            assert text is not None, "without the picture there is the text"
            return *text, None if visible is None else visible | ~visible.any(-1, keepdim=True)  # never nothing at all
        key, value = own
        if text is None:
            return key, value, None
        mask = None if visible is None else F.pad(visible, (key.shape[2], 0), value=True)  # pixels are always visible
        return torch.cat([key, text[0]], dim=2), torch.cat([value, text[1]], dim=2), mask
