"""The U-Net of Prince (2023) fig. 18.9 with the text conditioning of Imagen.

With other settings it is Imagen's Efficient U-Net for super-resolution: `strides` that begin with 2 (each level
downsamples before its blocks and upsamples after them), most `blocks` at the coarse levels, `resampling` by
convolution, and one skip and one attention per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.models.attention import Attention, KeysValues
from cascade.models.blocks import (
    AddingResidualBlock,
    Downsample,
    EnlargingUpsample,
    Normalize,
    ResidualBlock,
    StridedDownsample,
    Upsample,
    depth_to_space,
    silu,
    space_to_depth,
    stacked,
    zero_init,
)
from cascade.models.conditioned import ConditionedNetwork, Seen, TextUse
from cascade.models.network import Geometry, NetworkConfig, module_list, rounded_up
from cascade.settings import LAYERS, Layers, Side, Width, check_network


class UNetConfig(NetworkConfig):
    """The U-Net. Lists have one entry per level, from the finest to the coarsest."""

    reads_conditions: ClassVar[bool] = True
    kind: Literal["unet"] = "unet"
    channels: tuple[Width, ...] = (64, 128, 192)
    """Width of each level."""
    blocks: tuple[Layers, ...] = (1, 2, 2)
    """Residual blocks of each level, the same on the way down and up."""
    strides: tuple[Literal[1, 2], ...] = (1, 2, 2)
    """Downsampling *before* each level's blocks. Starting with 2 gives the Efficient U-Net of Imagen (fig. A.28)."""
    attention: tuple[bool, ...] = (False, True, True)
    """Whether the blocks of a level are followed by global self-attention (with the text tokens joined in)."""
    attention_after: Literal["blocks", "level"] = "blocks"
    """Attention after each block of a level, or once after its last, as in Imagen's Efficient U-Net."""
    self_attention: bool = True
    """Whether attention sees the picture as well as the text. If false, each pixel attends to the text alone, as in
    Imagen's 1024 stage, with equal results on a crop and on the whole picture."""
    middle_blocks: Annotated[int, Field(ge=0), LAYERS.validator] = 1
    """Residual blocks after the coarsest level, each but the last followed by attention where that level has it."""
    patch: Side = 1
    """Space-to-depth factor of the stem: the network works at 1/patch of the resolution."""
    modulation: Literal["scale_shift", "add"] = "scale_shift"
    """How the embedding of noise level and pooled text enters a residual block: it scales and shifts the features, or
    is added to them at every pixel, as in Prince's figure 18.9."""
    resampling: Literal["shuffle", "conv"] = "shuffle"
    """Between levels, down and up: `shuffle`, space-to-depth with a 1x1 convolution, or `conv`, a 3x3 one (Imagen)."""
    skips: Literal["concat", "add", "level"] = "concat"
    """How the way up receives the way down: concatenated or added block by block, or added once per `level`."""
    skip_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the skips; Imagen's Efficient U-Net uses 1/sqrt(2)."""
    norm: Literal["group", "pixel"] = "group"
    """`group`: GroupNorm over the picture. `pixel`: LayerNorm over each pixel's channels, equal on crop and whole."""
    groups: Width = 32
    """Groups of `norm: group`."""
    head_dim: Width = 64
    """Width of one attention head."""
    embedding_dim: Width = 256
    """Width of the noise-level embedding."""
    text: TextUse = "attention"
    """`attention`: tokens join keys and values, and pooled text joins the embedding. `pooled`: only the latter."""
    text_dim: Width = 256
    """Width of the text encoder's embeddings."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside residual blocks at levels with attention (the coarse ones)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.channels:
            raise ValueError("channels is empty; give at least one level")
        for name in ("blocks", "strides", "attention"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, channels has {len(self.channels)};"
                    " give one per level"
                )
        check_network(self.channels, self.blocks)
        if any(self.attention) and not self.self_attention and self.text != "attention":
            raise ValueError(
                f"self_attention: false attends to text alone, but text: {self.text} provides no tokens;"
                " set text: attention"
            )
        if self.embedding_dim % 2:
            raise ValueError(f"embedding_dim {self.embedding_dim} must be even: half sines, half cosines")
        for width, attends in zip(self.channels, self.attention, strict=True):
            if attends and width % self.head_dim:
                raise ValueError(f"head_dim {self.head_dim} does not divide the {width} channels that attend")
            if self.norm == "group" and width % self.groups:
                raise ValueError(
                    f"groups {self.groups} does not divide {width} channels; use norm: pixel or fewer groups"
                )
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the network sees the prompt at all."""
        return self.text != "none"

    def geometry(self, channels: int) -> Geometry:
        """See `Geometry`. At least the skips and the input are in memory together."""
        numbers, cell = float(channels), self.patch
        for width, blocks, stride in zip(self.channels, self.blocks, self.strides, strict=True):
            cell *= stride
            numbers += width * (1 if self.skips == "level" else blocks) / cell**2
        return Geometry(cell, self._receptive_radius(cell), numbers, float(self.channels[0]))

    def _receptive_radius(self, divisor: int) -> int | None:
        """The receptive radius in pixels, rounded up at each coarser level; None for the whole picture."""
        if self.norm == "group" or (any(self.attention) and self.self_attention):
            return None
        cell = radius = self.patch  # the head
        cells = []
        for blocks, stride in zip(self.blocks, self.strides, strict=True):
            if self.resampling == "conv":
                radius += 2 * cell  # on the way up, and down
            cell *= stride
            cells.append(cell)
            radius = rounded_up(radius, cell) + 2 * blocks * cell
        radius += 2 * self.middle_blocks * cell
        radius += sum(2 * blocks * size for blocks, size in zip(self.blocks, cells, strict=True))
        return rounded_up(radius + self.patch, divisor)  # with the stem

    def build(self, channels: int, low_res_channels: int = 0) -> UNet:
        """The network with fresh weights."""
        return UNet(self, channels, low_res_channels)


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


class UNet(ConditionedNetwork):
    """(z, log SNR, conditions) -> output, shaped like z. Independent of schedule and parameterization."""

    def __init__(self, config: UNetConfig, channels: int, low_res_channels: int = 0) -> None:
        """channels: of the pictures. low_res_channels: of the smaller picture, which is stacked with z."""
        super().__init__(config.embedding_dim, config.text, config.text_dim, low_res_channels)
        self.config = config
        self.divisor = config.geometry(channels).divisor
        width, bottom, patch = config.channels[0], config.channels[-1], config.patch
        self.stem = nn.Conv2d((channels + low_res_channels) * patch**2, width, 3, padding=1)
        self.levels = module_list(Level(config, index) for index in range(len(config.channels)))
        attends = [config.attention[-1] and index < config.middle_blocks - 1 for index in range(config.middle_blocks)]
        self.middle = module_list(
            Block(config, bottom, bottom, each, config.dropout if each else 0.0) for each in attends
        )
        self.head_norm = Normalize(width, config.norm, config.groups)
        self.head = zero_init(nn.Conv2d(width, channels * patch**2, 3, padding=1))

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | Seen) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, C, H, W). H and W: multiples of the geometry's divisor.

        Raises ValueError for any other size.
        """
        seen = self.prepare(cond) if isinstance(cond, Conditioning) else cond
        embedding = F.silu(self.noise_level(log_snr) + seen.embedding)  # (B, E)
        run = recomputed if self.activation_checkpointing and torch.is_grad_enabled() else nn.Module.__call__
        text = iter(seen.text)
        x = stacked(z, seen.low_res, self.divisor).to(self.stem.weight.dtype)
        h = self.stem(space_to_depth(x.contiguous(memory_format=torch.channels_last), self.config.patch))
        h = h if seen.features is None else h + seen.features
        skips: list[list[Tensor]] = []
        for level in self.levels:
            h = level.down(h)
            skips.append([])
            for block in level.encode:
                h = run(block, h, embedding, next(text), seen.visible)
                skips[-1].append(h)
        for block in self.middle:
            h = run(block, h, embedding, next(text), seen.visible)
        for level in reversed(self.levels):
            from_encoder = skips.pop()[-1 if self.config.skips == "level" else 0 :]
            for block in level.decode:
                if from_encoder:
                    skip = from_encoder.pop()
                    skip = skip if self.config.skip_scale == 1 else skip * self.config.skip_scale
                    h = torch.cat([h, skip], dim=1) if self.config.skips == "concat" else h + skip
                h = run(block, h, embedding, next(text), seen.visible)
            h = level.up(h)
        return depth_to_space(self.head(silu(self.head_norm(h))), self.config.patch)

    @property
    def first_map(self) -> tuple[int, int]:
        """See `ConditionedNetwork.first_map`."""
        return self.config.channels[0], self.config.patch

    def read_text(self, text: Tensor | None) -> Sequence[KeysValues | None]:
        """See `ConditionedNetwork.read_text`."""
        return [block.read_text(text) for block in self.blocks()]

    def blocks(self) -> list[Block]:
        """All blocks in the order of `forward`."""
        down, up = (level.encode for level in self.levels), (level.decode for level in reversed(self.levels))
        return list(chain(*down, self.middle, *up))

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The levels, with the layers between them, and the middle."""
        return [*self.levels, *self.middle]

    def attention_layers(self) -> Sequence[Attention]:
        """The attention layers of all blocks."""
        return [block.attention for block in self.blocks() if block.attention is not None]

    def sharded_blocks(self) -> Sequence[ResidualBlock]:
        """Residual blocks, which hold most weights; attention's text projections are read before any block runs."""
        return [block.residual for block in self.blocks()]


def recomputed(block: nn.Module, *inputs: Tensor | KeysValues | None) -> Tensor:
    """Run a block whose activations are recomputed in the backward pass."""
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False)
    return output
