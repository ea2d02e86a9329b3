"""The U-Net of Prince (2023) fig. 18.9 with the text conditioning of Imagen.

Its settings make Imagen's Efficient U-Net for super-resolution of it: `strides` that begin with 2 (each level
downsamples before its blocks and upsamples after them), most `blocks` at the coarse levels, `resampling` by
convolution, and `skips` and attention once a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig
from cascade.models.attention import Attention, KeysValues
from cascade.models.blocks import (
    Downsample,
    EnlargingUpsample,
    Normalize,
    ResidualBlock,
    StridedDownsample,
    Upsample,
    depth_to_space,
    silu,
    space_to_depth,
    zero_init,
)
from cascade.models.checks import check_conditions, check_size
from cascade.models.embeddings import NoiseLevelEmbedding, TextPooling
from cascade.models.network import Network

PICTURE_CHANNELS = 3


@dataclass(frozen=True)
class UNetPrepared:
    """What a U-Net computes once per picture rather than once per step.

    embedding: (B, E) from pooled text and augmentation level. text: keys and values for each attention, in order.
    visible: (B, 1, 1, N), None when all tokens are real. low_res: (B, 3, H, W), upsampled.
    """

    embedding: Tensor
    text: tuple[KeysValues | None, ...]
    visible: Tensor | None
    low_res: Tensor | None

    def crop(self, rows: slice, columns: slice) -> UNetPrepared:
        """The same for a part of the picture."""
        return self if self.low_res is None else replace(self, low_res=self.low_res[:, :, rows, columns])


class Block(nn.Module):
    """A residual block, followed by attention at the levels that have it."""

    def __init__(self, config: UNetConfig, channels_in: int, channels: int, attends: bool, dropout: float) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels, config.embedding_dim, config.norm, config.groups, dropout)
        text_dim = config.text_dim if config.text == "attention" else None
        self.attention: Attention | None = None
        if attends:
            self.attention = Attention(
                channels, config.head_dim, text_dim, config.norm, config.groups, config.self_attention
            )

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
        self.down = down(outer, channels, stride) if changes else nn.Identity()
        dropout = config.dropout if config.attention[index] else 0.0
        self.encode = nn.ModuleList(Block(config, channels, channels, each, dropout) for each in attends)
        self.decode = nn.ModuleList(Block(config, joined, channels, each, dropout) for each in attends)
        self.up = up(channels, outer, stride) if changes else nn.Identity()

    def encoder(self) -> list[Block]:
        """Blocks on the way down."""
        return cast("list[Block]", list(self.encode))

    def decoder(self) -> list[Block]:
        """Blocks on the way up."""
        return cast("list[Block]", list(self.decode))


class UNet(Network):
    """(z, log SNR, conditions) -> output, shaped like z. It knows no schedule and no parameterization."""

    def __init__(self, config: UNetConfig, low_res_channels: int = 0) -> None:
        """low_res_channels: 3 for a super-resolution stage, whose conditions hold the smaller picture."""
        super().__init__()
        self.config = config
        self.low_res_channels = low_res_channels
        width, bottom, patch = config.embedding_dim, config.channels[-1], config.patch
        self.noise_level = NoiseLevelEmbedding(width)
        self.aug_level = NoiseLevelEmbedding(width) if low_res_channels else None
        self.text_norm = nn.LayerNorm(config.text_dim) if config.text != "none" else None
        self.text_pooling = TextPooling(config.text_dim, width) if config.text != "none" else None
        self.stem = nn.Conv2d((PICTURE_CHANNELS + low_res_channels) * patch**2, config.channels[0], 3, padding=1)
        self.levels = nn.ModuleList(Level(config, index) for index in range(len(config.channels)))
        attends = [config.attention[-1] and index < config.middle_blocks - 1 for index in range(config.middle_blocks)]
        self.middle = nn.ModuleList(
            Block(config, bottom, bottom, each, config.dropout if each else 0.0) for each in attends
        )
        self.head_norm = Normalize(config.channels[0], config.norm, config.groups)
        self.head = zero_init(nn.Conv2d(config.channels[0], PICTURE_CHANNELS * patch**2, 3, padding=1))

    def prepare(self, cond: Conditioning) -> UNetPrepared:
        """Everything that depends on the conditions alone. cond.low_res: (B, 3, H, W), already upsampled to z's size.

        Raises ValueError when a smaller picture is missing or not expected.
        """
        check_conditions(cond, self.low_res_channels)
        embedding = torch.zeros((), device=cond.text.device, dtype=self.stem.weight.dtype)
        text: list[KeysValues | None] = [None] * sum(1 for _ in self._attentions())
        visible = None
        if self.text_norm is not None and self.text_pooling is not None:
            normalized = self.text_norm(cond.text.to(self.text_norm.weight.dtype))
            embedding = embedding + self.text_pooling(normalized, cond.text_mask)
            text = [attention.read_text(normalized) for attention in self._attentions()]
            visible = None if _known_to_be_real(cond.text_mask) else cond.text_mask[:, None, None, :]
        if self.aug_level is not None:
            embedding = embedding + self.aug_level(cond.low_res_log_snr)
        return UNetPrepared(embedding, tuple(text), visible, cond.low_res)

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | UNetPrepared) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, C, H, W). H and W: multiples of config.downsampling.

        Raises ValueError for any other size.
        """
        seen = self.prepare(cond) if isinstance(cond, Conditioning) else cond
        check_size(z, seen.low_res, self.config.downsampling)
        embedding = F.silu(self.noise_level(log_snr) + seen.embedding)  # (B, E)
        text = iter(seen.text)

        def apply(block: Block, h: Tensor) -> Tensor:
            keys_values = next(text) if block.attention is not None else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, h, embedding, keys_values, seen.visible, use_reentrant=False)
            return block(h, embedding, keys_values, seen.visible)

        x = z if seen.low_res is None else torch.cat([z, seen.low_res], dim=1)
        x = x.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        h = self.stem(space_to_depth(x, self.config.patch))
        skips: list[list[Tensor]] = []
        for level in self._levels():
            h = level.down(h)
            skips.append([h := apply(block, h) for block in level.encoder()])
            skips[-1] = skips[-1][-1:] if self.config.skips == "level" else skips[-1]
        for block in self._middle():
            h = apply(block, h)
        for level in reversed(self._levels()):
            from_encoder = skips.pop()
            for block in level.decoder():
                h = apply(block, self._join(h, from_encoder.pop()) if from_encoder else h)
            h = level.up(h)
        return depth_to_space(self.head(silu(self.head_norm(h))), self.config.patch)

    def _join(self, h: Tensor, skip: Tensor) -> Tensor:
        skip = skip if self.config.skip_scale == 1 else skip * self.config.skip_scale
        return torch.cat([h, skip], dim=1) if self.config.skips == "concat" else h + skip

    def _levels(self) -> list[Level]:
        return cast("list[Level]", list(self.levels))

    def _middle(self) -> list[Block]:
        return cast("list[Block]", list(self.middle))

    def _attentions(self) -> Iterator[Attention]:
        """All attentions in the order in which `forward` meets them."""
        blocks = [block for level in self._levels() for block in level.encoder()]
        blocks += [*self._middle(), *(block for level in reversed(self._levels()) for block in level.decoder())]
        return (block.attention for block in blocks if block.attention is not None)


def _known_to_be_real(mask: Tensor) -> bool:
    """Whether every token (B, N) is real, where one may look: it waits for a GPU, and breaks a compiled graph."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
