"""Global self-attention over a feature map, with the text tokens joined to its keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.models.blocks import Normalize, zero_init

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text, each (B, heads, N, d)."""

MOST_QUERIES_AS_PRODUCTS = 256
"""Up to here two matrix products are faster on a CPU than the gradient of torch's fused attention in bfloat16."""


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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention. query: (B, heads, M, d); key, value: (B, heads, N, d); mask: (B, 1, 1, N) bool or None.

    Fused, but for training in bfloat16 on a CPU: there, with 64 queries, the fused gradient takes four times as long as
    the forward pass (a sixth of a step of the bundled base stage), two plain products a third of both.
    """
    few = query.shape[2] <= MOST_QUERIES_AS_PRODUCTS
    if not (few and query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)  # (B, heads, M, N)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value
