"""The encoder of T5, with the parameter names of transformers and results equal to its own in bits.

Importing transformers' T5 takes seconds, as long as drawing a picture. This module therefore reads the folders that it
supports; transformers reads all others, as well as 8-bit and streamed weights.

Source: Raffel et al. (2020); the gated feed-forward layer of T5 v1.1: Shazeer (2020), GLU variants.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from cascade.files.atomic import write_json
from cascade.files.tensors import save_tensors

EXACT_BUCKETS = 8  # of sixteen per direction: each distance from 0 to 7 has its own


class T5Settings(BaseModel):
    """The config.json of an encoder. A folder for which this raises ValidationError is left to transformers."""

    model_config = ConfigDict(extra="allow")  # transformers' other keys are kept and written back

    model_type: Literal["t5"]
    vocab_size: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_kv: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    layer_norm_epsilon: float = Field(1e-6, gt=0)
    relative_attention_num_buckets: Literal[32] = 32
    relative_attention_max_distance: int = Field(128, gt=EXACT_BUCKETS)


class Hidden(NamedTuple):
    """The encoder's output, under transformers' name for it."""

    last_hidden_state: Tensor
    """(B, N, D)."""


class T5Encoder(nn.Module):
    """Token ids and their mask, both (B, N) -> hidden states (B, N, D)."""

    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        self.config = config
        self.shared = _embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.shared.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Hidden:
        """attention_mask: bool, True at tokens, False at padding."""
        return Hidden(self.encoder(self.shared(input_ids), attention_mask))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers' T5EncoderModel reads as well."""
        kind = str(self.dtype).removeprefix("torch.")
        write_json(Path(folder) / "config.json", self.config.model_dump() | {"dtype": kind})
        save_tensors(Path(folder) / "model.safetensors", self.state_dict())


class _Stack(nn.Module):
    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config, first=number == 0) for number in range(config.num_layers))
        self.final_layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attention: _Attention = self.get_submodule("block.0.layer.0.SelfAttention")  # type: ignore[assignment]
        bias = attention.position_bias(x.shape[1])  # used by every layer, stored in the first
        bias = torch.where(mask[:, None, None, :], bias, torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        normed: Tensor = self.final_layer_norm(x)
        return normed


class _Block(nn.Module):
    def __init__(self, config: T5Settings, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, first), _FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Settings, first: bool) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config, first)
        self.layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        gated = config.feed_forward_proj == "gated-gelu"
        self.DenseReluDense = _GatedFeedForward(config) if gated else _FeedForward(config)
        self.layer_norm = _RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Attention(nn.Module):
    """Self-attention with a learned bias for the distance between two tokens, without scaling the logits."""

    def __init__(self, config: T5Settings, has_bias: bool) -> None:
        super().__init__()
        self.heads, self.max_distance = config.num_heads, config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = _embedding(config.relative_attention_num_buckets, config.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """(1, heads, length, length)."""
        place = torch.arange(length, device=self.q.weight.device)
        buckets = _bucket(place[None, :] - place[:, None], self.max_distance)
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(attended.transpose(1, 2).flatten(2))


def _bucket(distance: Tensor, max_distance: int) -> Tensor:
    """Signed distances in tokens -> rows of the bias: one row per short distance, long ones share rows by logarithm."""
    far = distance.abs()
    steps = torch.log(far.float() / EXACT_BUCKETS) / math.log(max_distance / EXACT_BUCKETS) * EXACT_BUCKETS
    shared = (EXACT_BUCKETS + steps.to(torch.long)).clamp(max=2 * EXACT_BUCKETS - 1)
    return torch.where(far < EXACT_BUCKETS, far, shared) + 2 * EXACT_BUCKETS * (distance > 0)


class _FeedForward(nn.Module):
    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(relu(self.wi(x)))


class _GatedFeedForward(nn.Module):
    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(_gelu(self.wi_0(x)) * self.wi_1(x))


def _gelu(x: Tensor) -> Tensor:
    """GELU approximated by tanh; torch's differs from transformers' in the last bit."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without initialization, for which torch would import its compiler on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class _RMSNorm(nn.Module):
    """x divided by its root mean square, computed in float32, times a weight."""

    def __init__(self, config: T5Settings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(self.weight.dtype)
