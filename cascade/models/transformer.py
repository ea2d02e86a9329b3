"""A transformer on patches of pixels: a picture of any height and width is a sequence of tokens.

Source: Li & He (2025, JiT) arXiv 2511.13720: patches of plain pixels enter through a bottleneck, the network predicts
the clean picture (parameterization x); RMSNorm, SwiGLU, normalized queries and keys, rotary positions along two axes.
The adaptive norms, which start at zero, are from Peebles & Xie (2023, DiT). As in `cascade.models.unet`, text tokens
join the keys and values of each block, and a smaller picture is stacked as channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.models.attention import KeysValues, attend, shares
from cascade.models.blocks import depth_to_space, space_to_depth, stacked, zero_init
from cascade.models.conditioned import ConditionedNetwork, Seen, TextUse
from cascade.models.network import Geometry, NetworkConfig, module_list
from cascade.settings import Layers, Side, Width, check_network

LONGEST_TURN = 100.0
"""Wavelength, in patches over 2 pi, of the slowest rotation (Heo et al. 2024, RoPE for vision)."""
PLACES = 4
"""Octaves of the sinusoids that encode a patch's position in the picture."""


class TransformerConfig(NetworkConfig):
    """A transformer on patches of pixels. Best with `parameterization: x`, whose target is a clean picture."""

    reads_conditions: ClassVar[bool] = True
    kind: Literal["transformer"] = "transformer"
    width: Width = 384
    """Width of a token."""
    depth: Layers = 12
    """Number of blocks, all alike."""
    patch: Side = 4
    """Height and width of a token in pixels: 4 gives 16 x 16 tokens for 64 px pictures."""
    bottleneck: Width = 64
    """Width of the bottleneck through which a patch of pixels enters, smaller than the patch."""
    head_dim: Width = 64
    """Width of one attention head, a multiple of 4."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of a block's MLP, as a multiple of the token width; the gate reduces it by a third."""
    embedding_dim: Width = 384
    """Width of the noise-level embedding."""
    text: TextUse = "attention"
    """`attention`: tokens join keys and values, and pooled text joins the embedding. `pooled`: only the latter."""
    text_dim: Width = 256
    """Width of the text encoder's embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the output of each block's attention and MLP."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_network([self.width], [self.depth])
        if self.width % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide width {self.width}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 4: a sine and a cosine for either axis")
        if self.embedding_dim % 2:
            raise ValueError(f"embedding_dim {self.embedding_dim} must be even: half sines, half cosines")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return self.text != "none"

    @property
    def mlp_width(self) -> int:
        """Hidden width of a block's MLP: two thirds of the ratio, as it has three matrices instead of two; even."""
        return 2 * max(round(self.mlp_ratio * self.width / 3), 1)

    def geometry(self, channels: int) -> Geometry:
        """See `Geometry`. Attention reads the whole picture; tokens, keys and values are in memory together."""
        each = 1 / self.patch**2
        return Geometry(self.patch, None, channels + 4 * self.width * each, self.width * each)

    def build(self, channels: int, low_res_channels: int = 0) -> Transformer:
        """The network with fresh weights."""
        return Transformer(self, channels, low_res_channels)


class TokenAttention(nn.Module):
    """Patches are the queries, patches and text tokens the keys and values.

    Queries and keys are normalized, which bounds the logits.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.width // config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, h: Tensor, turns: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor:
        """h: (B, N, C); turns: see `rotations`; visible: (B, 1, 1, M), None when all text is real -> (B, N, C)."""
        query, key, value = self._asked(h, turns)
        mask = None
        if text is not None:
            mask = None if visible is None else F.pad(visible, (key.shape[2], 0), value=True)  # patches always are
            key, value = torch.cat([key, self.key_norm(text[0])], dim=2), torch.cat([value, text[1]], dim=2)
        return self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def text_shares(self, h: Tensor, turns: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor | None:
        """The share of each patch's attention that each text token receives: (B, heads, N, M); None without text.

        Arguments as for `forward`.
        """
        if text is None:
            return None
        query, key, _ = self._asked(h, turns)
        mask = None if visible is None else F.pad(visible, (key.shape[2], 0), value=True)
        return shares(query, torch.cat([key, self.key_norm(text[0])], dim=2), slice(key.shape[2], None), mask)

    def _asked(self, h: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the patches: each (B, heads, N, d)."""
        query, key, value = self.qkv(h).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        return rotate(self.query_norm(query), turns), rotate(self.key_norm(key), turns), value


class TransformerBlock(nn.Module):
    """Attention, then a gated MLP; scale, shift and gate of both are computed from the embedding and start at zero."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.adapt = zero_init(nn.Linear(config.embedding_dim, 6 * config.width))
        self.attention = TokenAttention(config)
        self.gate_and_value = nn.Linear(config.width, 2 * config.mlp_width)
        self.out = nn.Linear(config.mlp_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, h: Tensor, embedding: Tensor, turns: Tensor, text: KeysValues | None, visible: Tensor | None
    ) -> Tensor:
        """h: (B, N, C); embedding: (B, E), after its SiLU -> (B, N, C)."""
        scale_1, shift_1, share_1, scale_2, shift_2, share_2 = self.adapt(embedding)[:, None].chunk(6, dim=-1)
        attended = self.attention(adapted(h, scale_1, shift_1), turns, text, visible)
        h = h + share_1 * self.dropout(attended)
        gate, value = self.gate_and_value(adapted(h, scale_2, shift_2)).chunk(2, dim=-1)
        return h + share_2 * self.dropout(self.out(F.silu(gate) * value))


class Transformer(ConditionedNetwork):
    """(z, log SNR, conditions) -> output, shaped like z. Independent of schedule and parameterization."""

    def __init__(self, config: TransformerConfig, channels: int, low_res_channels: int = 0) -> None:
        """channels: of the pictures. low_res_channels: of the smaller picture, which is stacked with z."""
        super().__init__(config.embedding_dim, config.text, config.text_dim, low_res_channels)
        self.config = config
        width, pixels = config.width, config.patch**2
        self.narrow = nn.Linear((channels + low_res_channels) * pixels, config.bottleneck, bias=False)
        self.widen = nn.Linear(config.bottleneck, width)
        self.place = nn.Linear(4 * PLACES, width)
        # The layers for keys and values of the text are outside the blocks: they run before any block.
        reads = config.depth if config.text == "attention" else 0
        self.text_key_values = module_list(nn.Linear(config.text_dim, 2 * width, bias=False) for _ in range(reads))
        self.blocks = module_list(TransformerBlock(config) for _ in range(config.depth))
        self.head_adapt = zero_init(nn.Linear(config.embedding_dim, 2 * width))
        self.head = zero_init(nn.Linear(width, channels * pixels))

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | Seen) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, C, H, W). H and W: multiples of the patch.

        Raises ValueError for any other size.
        """
        seen = self.prepare(cond) if isinstance(cond, Conditioning) else cond
        x = stacked(z, seen.low_res, self.config.patch)
        embedding = F.silu(self.noise_level(log_snr) + seen.embedding)  # (B, E)
        patches = space_to_depth(x.to(self.head.weight.dtype), self.config.patch)  # (B, C P P, H / P, W / P)
        rows, columns = patches.shape[-2:]
        where = centres(rows, columns, z.device)  # (N, 2)
        turns = rotations(where, self.config.head_dim)
        h = self.widen(self.narrow(patches.flatten(2).mT))  # (B, N, C)
        h = h + self.place(places(where, rows, columns).to(h.dtype))
        h = h if seen.features is None else h + seen.features.flatten(2).mT.contiguous()
        for block, text in zip(self.blocks, seen.text, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, embedding, turns, text, seen.visible, use_reentrant=False)
            else:
                h = block(h, embedding, turns, text, seen.visible)
        scale, shift = self.head_adapt(embedding)[:, None].chunk(2, dim=-1)
        output = self.head(adapted(h, scale, shift))  # (B, N, C P P)
        return depth_to_space(output.mT.unflatten(2, (rows, columns)), self.config.patch)

    @property
    def first_map(self) -> tuple[int, int]:
        """See `ConditionedNetwork.first_map`."""
        return self.config.width, self.config.patch

    def read_text(self, text: Tensor | None) -> Sequence[KeysValues | None]:
        """See `ConditionedNetwork.read_text`."""
        if text is None or not self.text_key_values:
            return [None] * self.config.depth
        heads = 2 * self.config.width // self.config.head_dim
        both = [
            layer(text).unflatten(-1, (heads, -1)).transpose(1, 2).chunk(2, dim=1) for layer in self.text_key_values
        ]
        return [(key, value) for key, value in both]

    def repeated_blocks(self) -> Sequence[TransformerBlock]:
        """All blocks."""
        return list(self.blocks)

    def attention_layers(self) -> Sequence[nn.Module]:
        """The blocks' attention, and the layers for keys and values of the text."""
        return [*(block.attention for block in self.blocks), *self.text_key_values]


def adapted(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMSNorm with scale and shift (B, 1, C) in place of weights: (B, N, C) -> (B, N, C)."""
    return torch.addcmul(shift, F.rms_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def centres(rows: int, columns: int, device: torch.device) -> Tensor:
    """Offset (down, right) of each patch from the middle of the picture, in patches: (N, 2)."""
    down, right = (torch.arange(count, device=device) - (count - 1) / 2 for count in (rows, columns))
    return torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1).flatten(0, 1)


def places(where: Tensor, rows: int, columns: int) -> Tensor:
    """Encoded position of each patch: (N, 2) in patches -> (N, 4 PLACES) sines and cosines.

    The unit is half the side of a square of the picture's area, so that a picture twice as large has the same
    positions, and a wider one goes beyond them on its right and left.
    """
    octaves = math.pi / 2 * 2.0 ** torch.arange(PLACES, device=where.device)
    angle = (2 * where / math.sqrt(rows * columns))[:, :, None] * octaves  # (N, 2, PLACES)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


def rotations(where: Tensor, head_dim: int) -> Tensor:
    """Cosine and sine of the angle by which each pair of a head's values is rotated: (N, 2) -> (2, N, head_dim / 2).

    Half of the pairs rotate with the row, half with the column, so that the product of query and key depends on their
    distance in patches.
    Source: Su et al. (2021) sec. 3.2, for two axes.
    """
    count = head_dim // 4
    speed = LONGEST_TURN ** -(torch.arange(count, device=where.device) / count)
    angle = (where[:, :, None] * speed).flatten(1)  # (N, head_dim / 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of (B, heads, N, d) by its angle."""
    cosine, sine = turns.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
