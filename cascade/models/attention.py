"""Global self-attention over a feature map, with the text tokens joined to its keys and values."""

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

    Source: Imagen (Saharia et al. 2022) sec. D.1: text concatenated to the keys and values of self-attention.
    """

    def __init__(self, channels: int, head_dim: int, text_dim: int | None, norm: str, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = Normalize(channels, norm, groups)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
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
        qkv = self.qkv(tokens).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)  # (B, 3 heads, HW, d)
        query, key, value = qkv.chunk(3, dim=1)
        mask = None
        if text is not None:
            key, value = torch.cat([key, text[0]], dim=2), torch.cat([value, text[1]], dim=2)
            if visible is not None:
                mask = F.pad(visible, (height * width, 0), value=True)  # pixels are always visible
        answer = attend(query, key, value, mask)  # (B, heads, HW, d)
        update = self.out(answer.transpose(1, 2).flatten(2))  # (B, HW, C)
        return h + update.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
