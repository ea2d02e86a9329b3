"""The U-Net of DeepFloyd IF, with the parameter names of its published weights.

Differences from `cascade.models.unet`: average pooling down and nearest neighbours up inside residual blocks; GELU;
attention whose keys begin with the text; a text norm over all tokens; raw T5 states pooled into the noise embedding,
which encodes a step number; and a second half of the output that interpolates the log variance.

Source: DeepFloyd IF (2023); Saharia et al. (2022) sec. D.1 and F.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.diffusion.schedules import DiscreteSchedule, squared_cosine_betas
from cascade.models.blocks import stacked
from cascade.models.convolution import one_generation
from cascade.models.if_blocks import (
    IFAttention,
    IFResidualBlock,
    KeysValues,
    Level,
    Middle,
    TextEmbedding,
    TwoLayers,
    level_down,
    level_up,
)
from cascade.models.network import Geometry, Network, NetworkConfig, check_conditions
from cascade.settings import Layers, Width, check_network

IF_NOISE = DiscreteSchedule(squared_cosine_betas(1000))
"""The schedule whose step numbers the networks read, whatever schedule a stage is drawn with."""


class IFUNetConfig(NetworkConfig):
    """The U-Net of DeepFloyd IF. Lists have one entry per level, from the finest to the coarsest."""

    enlarges_first: ClassVar[bool] = True
    predicts_variance: ClassVar[bool] = True
    needs_schedule: ClassVar[str | None] = "squared_cosine"
    reads_padding: ClassVar[bool] = True
    has_foreign_weights: ClassVar[bool] = True

    kind: Literal["if_unet"] = "if_unet"
    channels: tuple[Width, ...] = (192, 384, 576, 768)
    """Width of each level; each but the finest has half the size of the one before."""
    blocks: tuple[Layers, ...] = (3, 3, 3, 3)
    """Residual blocks of each level on the way down; one more on the way up."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Whether the blocks of a level are followed by attention."""
    self_attention: bool = True
    """Whether attention sees the picture as well as the text."""
    embedding_dim: Width = 768
    """Width of the noise-level embedding."""
    block_scale: Annotated[float, Field(gt=0)] = 1.0
    """A residual block's sum is divided by this; 1.41423 in stage II."""
    text_dim: Width = 4096
    """Width of the text encoder's embeddings."""
    context_dim: Width = 768
    """Width to which text is projected before attention; a multiple of 32."""
    head_dim: Width = 64
    """Width of one attention head."""
    pooling_heads: Width = 64
    """Heads of the text pooling."""
    groups: Width = 32
    """Groups of GroupNorm over the picture."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("blocks", "attention"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, channels has {len(self.channels)};"
                    " give one per level"
                )
        check_network(self.channels, self.blocks)
        for width, attends in zip(self.channels, self.attention, strict=True):
            if width % self.groups or width % 2:
                raise ValueError(f"channels {width} must be even and a multiple of groups {self.groups}")
            if attends and width % self.head_dim:
                raise ValueError(f"head_dim {self.head_dim} does not divide the {width} channels that attend")
        if self.channels[-1] % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide the {self.channels[-1]} channels at the bottom")
        if self.context_dim % 32:
            raise ValueError(f"context_dim {self.context_dim} must be a multiple of 32, the groups of its norm")
        if self.text_dim % self.pooling_heads:
            raise ValueError(f"pooling_heads {self.pooling_heads} does not divide text_dim {self.text_dim}")
        return self

    def geometry(self, channels: int) -> Geometry:
        """See `Geometry`. The receptive field is the whole picture, because of attention and GroupNorm."""
        numbers = float(channels) + self.channels[0]
        for level, (width, blocks) in enumerate(zip(self.channels, self.blocks, strict=True)):
            numbers += width * blocks / 4**level
            if level < len(self.channels) - 1:
                numbers += width / 4 ** (level + 1)
        return Geometry(2 ** (len(self.channels) - 1), None, numbers, float(self.channels[0]))

    def build(self, channels: int, low_res_channels: int = 0) -> IFUNet:
        """The network with fresh weights."""
        return IFUNet(self, channels, low_res_channels)


@dataclass(frozen=True)
class IFPrepared:
    """Values computed once per picture instead of once per step.

    embedding: (B, E) from the pooled text and, in stage II, the noise on the smaller picture. text: keys and values
    for each attention, in order. low_res: (B, C, H, W), upsampled and noised. generation: identifies the calls that
    share transformed kernels.
    """

    embedding: Tensor
    text: tuple[KeysValues, ...]
    low_res: Tensor | None
    generation: object

    def crop(self, rows: slice, columns: slice) -> IFPrepared:
        """The same values for a part of the picture."""
        return self if self.low_res is None else replace(self, low_res=self.low_res[:, :, rows, columns])


class IFUNet(Network):
    """(z, log SNR, conditions) -> (B, 2 C, H, W): predicted noise, then the place of the log variance in [-1, 1]."""

    def __init__(self, config: IFUNetConfig, channels: int, low_res_channels: int = 0) -> None:
        """channels: of the pictures. low_res_channels: of the enlarged, noised smaller picture, stacked with z."""
        super().__init__()
        self.config = config
        self.divisor = config.geometry(channels).divisor
        self.low_res_channels = low_res_channels
        first, width = config.channels[0], config.embedding_dim
        self.conv_in = nn.Conv2d(channels + low_res_channels, first, 3, padding=1)
        self.time_embedding = TwoLayers(first, width)
        self.class_embedding: TwoLayers | None = TwoLayers(first, width) if low_res_channels else None
        self.encoder_hid_proj = nn.Linear(config.text_dim, config.context_dim)
        self.add_embedding = TextEmbedding(config.text_dim, width, config.pooling_heads)
        self.down_blocks = nn.ModuleList(level_down(config, index) for index in range(len(config.channels)))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(level_up(config, index) for index in reversed(range(len(config.channels))))
        self.conv_norm_out = nn.GroupNorm(config.groups, first)
        self.conv_out = nn.Conv2d(first, 2 * channels, 3, padding=1)

    def prepare(self, cond: Conditioning) -> IFPrepared:
        """Everything that depends only on the conditions. cond.low_res: (B, C, H, W), already of z's size.

        The text mask is ignored: IF also reads T5's states of the padding, up to 77 tokens. Raises ValueError when a
        smaller picture is missing or not expected.
        """
        check_conditions(cond, self.low_res_channels)
        states = cond.text.to(self.conv_in.weight.dtype)
        embedding = self.add_embedding(states)  # (B, E)
        if self.class_embedding is not None and cond.low_res_log_snr is not None:
            embedding = embedding + self.class_embedding(self._sinusoids(cond.low_res_log_snr))
        context = self.encoder_hid_proj(states)  # (B, N, D)
        text = tuple(attention.read_text(context) for attention in self._attentions())
        # A compiled network shares no transformed kernels, and a new object cannot be traced.
        generation = None if torch.compiler.is_compiling() else object()
        return IFPrepared(embedding, text, cond.low_res, generation)

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | IFPrepared) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, 2 C, H, W). H and W: multiples of the geometry's divisor.

        Between calls with the same prepared conditions, no weight may change. Raises ValueError for any other size.
        """
        if isinstance(cond, Conditioning):  # a single call: transforming the kernels would cost as much as it saves
            return self._output(z, log_snr, self.prepare(cond))
        with nullcontext() if torch.compiler.is_compiling() else one_generation(cond.generation):
            return self._output(z, log_snr, cond)

    def _output(self, z: Tensor, log_snr: Tensor, seen: IFPrepared) -> Tensor:
        x = stacked(z, seen.low_res, self.divisor)
        embedding = F.gelu(self.time_embedding(self._sinusoids(log_snr)) + seen.embedding)  # (B, E)
        text = iter(seen.text)

        def apply(pair: tuple[IFResidualBlock, IFAttention | None], h: Tensor) -> Tensor:
            block, attention = pair
            h = self._run(block, h, embedding)
            return h if attention is None else self._run(attention, h, next(text))

        h = self.conv_in(x.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self._levels(self.down_blocks):
            for pair in level.blocks():
                h = apply(pair, h)
                skips.append(h)
            if level.change is not None:
                h = self._run(level.change, h, embedding)
                skips.append(h)
        for pair in self.mid_block.blocks():
            h = apply(pair, h)
        for level in self._levels(self.up_blocks):
            for pair in level.blocks():
                h = apply(pair, torch.cat([h, skips.pop()], dim=1))
            if level.change is not None:
                h = self._run(level.change, h, embedding)
        return self.conv_out(F.gelu(self.conv_norm_out(h)))

    def _run(self, block: nn.Module, *inputs: Tensor | KeysValues) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
        return cast(Tensor, block(*inputs))

    def _sinusoids(self, log_snr: Tensor) -> Tensor:
        """Cosines, then sines, of the step number: (B, 1, 1, 1) -> (B, C)."""
        half = self.config.channels[0] // 2
        exponent = -math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=log_snr.device)
        angle = IF_NOISE.nearest_step(log_snr).float()[:, None] * exponent.exp()
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(self.conv_in.weight.dtype)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The levels on the way down, the middle, the levels on the way up."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def attention_layers(self) -> Sequence[IFAttention]:
        """The attention layers of all blocks."""
        return list(self._attentions())

    def sharded_blocks(self) -> Sequence[IFResidualBlock]:
        """Residual blocks, which hold most weights; attention's text projections are read before any block runs."""
        return [module for module in self.modules() if isinstance(module, IFResidualBlock)]

    def _levels(self, blocks: nn.ModuleList) -> list[Level]:
        return cast("list[Level]", list(blocks))

    def _attentions(self) -> Iterator[IFAttention]:
        """All attention layers in the order of `forward`."""
        parts: list[Level | Middle] = [*self._levels(self.down_blocks), self.mid_block, *self._levels(self.up_blocks)]
        return (attention for part in parts for _, attention in part.blocks() if attention is not None)
