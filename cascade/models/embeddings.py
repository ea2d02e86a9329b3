"""Embeddings that every block reads: the noise level and the pooled text."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
