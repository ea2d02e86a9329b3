"""The levels of the U-Net: at each resolution residual blocks, perhaps with attention, and the ways to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cascade.models.attention import Attention, KeysValues
from cascade.models.blocks import (
    AddingResidualBlock,
    Downsample,
    EnlargingUpsample,
    ResidualBlock,
    StridedDownsample,
    Upsample,
)
from cascade.models.network import module_list

if TYPE_CHECKING:  # the settings stand with the network that is made of these
    from cascade.models.unet import UNetConfig


class Block(nn.Module):
    """A residual block, followed by attention at the levels that have it."""

    def __init__(self, config: UNetConfig, channels_in: int, channels: int, attends: bool, dropout: float) -> None:
        super().__init__()
        residual = AddingResidualBlock if config.modulation == "add" else ResidualBlock
        self.residual = residual(channels_in, channels, config.embedding_dim, config.norm, config.groups, dropout)
        text_dim = config.text_dim if config.text == "attention" else None
        self.attention: Attention | None = None
        if attends:
            self.attention = Attention(
                channels, config.head_dim, text_dim, config.norm, config.groups, config.self_attention
            )

    def read_text(self, text: Tensor | None) -> KeysValues | None:
        """Keys and values of normalized text (B, N, D); None for a block that reads none."""
        return None if text is None or self.attention is None else self.attention.read_text(text)

    def forward(self, h: Tensor, embedding: Tensor, text: KeysValues | None, visible: Tensor | None) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        h = self.residual(h, embedding)
        return h if self.attention is None else self.attention(h, text, visible)


class Level(nn.Module):
    """One resolution: down, blocks on the way down, the same number on the way up with the skips, up."""

    def __init__(self, config: UNetConfig, index: int) -> None:
        super().__init__()
        channels, stride = config.channels[index], config.strides[index]
        outer = config.channels[max(index - 1, 0)]
        count, every = config.blocks[index], config.attention_after == "blocks"
        attends = [config.attention[index] and (every or place == count - 1) for place in range(count)]
        joined = 2 * channels if config.skips == "concat" else channels
        changes = stride > 1 or outer != channels
        by_conv = config.resampling == "conv"
        down, up = (StridedDownsample, EnlargingUpsample) if by_conv else (Downsample, Upsample)
        self.down: nn.Module = down(outer, channels, stride) if changes else nn.Identity()
        dropout = config.dropout if config.attention[index] else 0.0
        self.encode = module_list(Block(config, channels, channels, each, dropout) for each in attends)
        self.decode = module_list(Block(config, joined, channels, each, dropout) for each in attends)
        self.up: nn.Module = up(channels, outer, stride) if changes else nn.Identity()
