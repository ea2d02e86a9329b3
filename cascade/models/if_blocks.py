"""Building blocks and levels of DeepFloyd IF's U-Net, with the parameter names of its published weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.models.attention import attend, shares
from cascade.models.convolution import Convolution

if TYPE_CHECKING:
    from cascade.models.if_unet import IFUNetConfig


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the text, each (B, heads, N, d)."""

TEXT_GROUPS = 32


class TwoLayers(nn.Module):
    """Linear, GELU, Linear: from the sinusoids of a step number to an embedding."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) -> (B, width)."""
        return self.linear_2(F.gelu(self.linear_1(features)))


class Mix(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product: torch's convolution is slow for it on one thread."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        return F.linear(h.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class IFResidualBlock(nn.Module):
    """(shortcut(h) + conv(gelu(scale-shift(norm(conv(resize(gelu(norm(h))))))))) / block_scale.

    Resizing precedes the first convolution, on both branches: down by 2x2 means, up by repetition.
    """

    def __init__(
        self,
        config: IFUNetConfig,
        channels_in: int,
        channels: int,
        resize: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.resize = resize
        self.block_scale = config.block_scale
        self.norm1 = nn.GroupNorm(config.groups, channels_in)
        self.conv1 = Convolution(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, 2 * channels)
        self.norm2 = nn.GroupNorm(config.groups, channels)
        self.conv2 = Convolution(channels, channels, 3, padding=1)
        self.conv_shortcut = Mix(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C_in, H, W); embedding: (B, E), after its GELU -> (B, C, H', W')."""
        inner = self._first(F.gelu(self.norm1(h)))  # (B, C, H', W')
        h = self._resized(h)
        scale, shift = self.time_emb_proj(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        inner = torch.addcmul(shift, self.norm2(inner), 1 + scale)
        inner = self.conv2(F.gelu(inner))
        h = h if self.conv_shortcut is None else self.conv_shortcut(h)
        return h + inner if self.block_scale == 1 else (h + inner) / self.block_scale

    def _first(self, inner: Tensor) -> Tensor:
        """Resizing and the first convolution, combined where that saves multiplications."""
        convolution: nn.Module = self.conv1  # low-rank adaptation replaces it by another class
        if self.resize == "up" and isinstance(convolution, Convolution) and convolution.transforms(inner):
            return convolution.enlarging(inner)
        return cast(Tensor, convolution(self._resized(inner)))

    def _resized(self, h: Tensor) -> Tensor:
        match self.resize:
            case "none":
                return h
            case "down":
                return F.avg_pool2d(h, 2)
            case "up":
                return F.interpolate(h, scale_factor=2.0, mode="nearest")


class IFAttention(nn.Module):
    """Pixels are the queries, text tokens, then pixels, the keys and values; the result is added to the feature map."""

    def __init__(self, config: IFUNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // config.head_dim
        self.group_norm = nn.GroupNorm(config.groups, channels)
        self.norm_cross = nn.GroupNorm(TEXT_GROUPS, config.context_dim)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels) if config.self_attention else None
        self.to_v = nn.Linear(channels, channels) if config.self_attention else None
        self.add_k_proj = nn.Linear(config.context_dim, channels)
        self.add_v_proj = nn.Linear(config.context_dim, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def read_text(self, context: Tensor) -> KeysValues:
        """Keys and values of projected text (B, N, D), normalized over groups of channels and all its tokens."""
        tokens = self.norm_cross(context.transpose(1, 2)).transpose(1, 2)
        return self._split(self.add_k_proj(tokens)), self._split(self.add_v_proj(tokens))

    def forward(self, h: Tensor, text: KeysValues) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = h.shape
        tokens = self.group_norm(h).permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, HW, C)
        key, value = text
        if self.to_k is not None and self.to_v is not None:
            key = torch.cat([key, self._split(self.to_k(tokens))], dim=2)
            value = torch.cat([value, self._split(self.to_v(tokens))], dim=2)
        answer = attend(self._split(self.to_q(tokens)), key, value)  # (B, heads, HW, d)
        update = self.to_out[0](answer.transpose(1, 2).flatten(2))  # (B, HW, C)
        return h + update.reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def text_shares(self, h: Tensor, text: KeysValues) -> Tensor:
        """The share of each pixel's attention that each text token receives: (B, heads, HW, N).

        Arguments as for `forward`.
        """
        tokens, (key, _) = self.group_norm(h).flatten(2).mT, text  # (B, HW, C)
        kept = slice(key.shape[2])
        if self.to_k is not None:
            key = torch.cat([key, self._split(self.to_k(tokens))], dim=2)
        return shares(self._split(self.to_q(tokens)), key, kept)

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, d)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TextEmbedding(nn.Module):
    """Text as one vector: norm, attention pooling, projection, norm."""

    def __init__(self, text_dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = TextPooling(text_dim, heads)
        self.proj = nn.Linear(text_dim, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, width)."""
        return self.norm2(self.proj(self.pool(self.norm1(states))))


class TextPooling(nn.Module):
    """The mean token plus a learned position is the query; it and all other tokens are keys and values."""

    def __init__(self, text_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, text_dim) / text_dim**0.5)
        self.q_proj = nn.Linear(text_dim, text_dim)
        self.k_proj = nn.Linear(text_dim, text_dim)
        self.v_proj = nn.Linear(text_dim, text_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([mean, tokens], dim=1)  # (B, 1 + N, D)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return F.scaled_dot_product_attention(query, key, value).flatten(1)


# --- if levels -------------------------------------------------------------------------------------------------------
# The levels of DeepFloyd IF's U-Net, with the parameter names of its published weights.


class Level(nn.Module):
    """Residual blocks of one size, each optionally followed by attention, and the block that resizes for the next."""

    def __init__(self, config: IFUNetConfig, index: int, widths: list[int], change: nn.ModuleDict) -> None:
        """widths: input channels of each block. change: {"downsamplers": ...}, {"upsamplers": ...} or empty."""
        super().__init__()
        channels = config.channels[index]
        self.resnets = nn.ModuleList(IFResidualBlock(config, width, channels) for width in widths)
        if config.attention[index]:
            self.attentions = nn.ModuleList(IFAttention(config, channels) for _ in widths)
        for name, block in change.items():
            setattr(self, name, nn.ModuleList([block]))

    def blocks(self) -> list[tuple[IFResidualBlock, IFAttention | None]]:
        """Each residual block with the attention that follows it."""
        residual = cast("list[IFResidualBlock]", list(self.resnets))
        attention = cast("list[IFAttention | None]", list(getattr(self, "attentions", [None] * len(residual))))
        return list(zip(residual, attention, strict=True))

    @property
    def change(self) -> IFResidualBlock | None:
        """The block that resizes for the next level."""
        blocks = getattr(self, "downsamplers", None) or getattr(self, "upsamplers", None)
        return None if blocks is None else cast(IFResidualBlock, blocks[0])


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest size."""

    def __init__(self, config: IFUNetConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList(IFResidualBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([IFAttention(config, width)])

    def blocks(self) -> list[tuple[IFResidualBlock, IFAttention | None]]:
        """Each residual block with the attention that follows it."""
        first, second = cast("list[IFResidualBlock]", list(self.resnets))
        return [(first, cast(IFAttention, self.attentions[0])), (second, None)]


def level_down(config: IFUNetConfig, index: int) -> Level:
    """A level on the way down; each but the coarsest ends with a downsampling block."""
    channels, before = config.channels[index], config.channels[max(index - 1, 0)]
    widths = [before, *[channels] * (config.blocks[index] - 1)]
    change = nn.ModuleDict()
    if index < len(config.channels) - 1:
        change["downsamplers"] = IFResidualBlock(config, channels, channels, "down")
    return Level(config, index, widths, change)


def level_up(config: IFUNetConfig, index: int) -> Level:
    """A level on the way up: one block more than on the way down, for the skip from the level's input."""
    channels, before = config.channels[index], config.channels[max(index - 1, 0)]
    below = config.channels[min(index + 1, len(config.channels) - 1)]
    entering = [below, *[channels] * config.blocks[index]]
    skips = [*[channels] * config.blocks[index], before]
    widths = [width + skip for width, skip in zip(entering, skips, strict=True)]
    change = nn.ModuleDict()
    if index > 0:
        change["upsamplers"] = IFResidualBlock(config, channels, channels, "up")
    return Level(config, index, widths, change)
