"""Transformer blocks of the network's own between the frozen text encoder and whatever reads the text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.models.blocks import zero_init

FARTHEST = 16
"""Tokens farther apart than this share one bias."""


class TextRefiner(nn.Module):
    """Text in, text of the same shape out, each token now knowing the ones beside it in the way that pictures need.

    A frozen encoder need not say which noun an adjective belongs to: from a small one's state at `circle` in `a red
    circle and a blue square`, a linear probe told red from blue no better than a coin. These blocks are trained with the
    pictures. They begin as the identity. Source: the token refiner of HunyuanVideo (Kong et al. 2024, sec. 4.2), with
    biases by distance (Shaw et al. 2018; Raffel et al. 2020) as it must tell `red` before a noun from `red` after it.
    """

    def __init__(self, text_dim: int, blocks: int, head_dim: int = 64) -> None:
        super().__init__()
        heads = max(text_dim // head_dim, 1)
        self.positions = nn.Parameter(torch.zeros(heads, 2 * FARTHEST + 1))
        self.blocks = nn.ModuleList(TextBlock(text_dim, heads, head_dim) for _ in range(blocks))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """text: (B, N, D) normalized; mask: (B, N) bool -> (B, N, D)."""
        place = torch.arange(text.shape[1], device=text.device)
        distance = (place[None, :] - place[:, None]).clamp(-FARTHEST, FARTHEST) + FARTHEST  # (N, N)
        # Every token sees itself, so that a padded one stays finite.
        seen = mask[:, None, None, :] | (place[None, :] == place[:, None])  # (B, 1, N, N)
        bias = self.positions[:, distance].masked_fill(~seen, float("-inf"))  # (B, heads, N, N)
        for block in self.blocks:
            text = block(text, bias)
        return text


class TextBlock(nn.Module):
    """Self-attention and a two-layer network, each normalized before and added after."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.out = zero_init(nn.Linear(heads * head_dim, width))
        self.mlp_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.mlp_out = zero_init(nn.Linear(4 * width, width))

    def forward(self, text: Tensor, bias: Tensor) -> Tensor:
        """text: (B, N, D); bias: (B, heads, N, N), -inf where a token is not seen -> (B, N, D)."""
        qkv = self.qkv(self.attention_norm(text)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        query, key, value = qkv.chunk(3, dim=1)  # (B, heads, N, d)
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2) + bias  # (B, heads, N, N)
        answer = scores.softmax(dim=-1).to(value.dtype) @ value
        text = text + self.out(answer.transpose(1, 2).flatten(2))
        return text + self.mlp_out(F.gelu(self.hidden(self.mlp_norm(text))))
