"""The U-Net of DeepFloyd IF, written so that its published weights fit: every parameter has the name they give it.

Beside ours (`cascade.models.unet`): average pooling down and nearest neighbours up inside residual blocks, GELU,
attention whose keys begin with the text, a text norm over all tokens, raw T5 states pooled into the noise level,
which is the number of a step, and a second half of the output that says where the variance lies.

Source: DeepFloyd IF (2023), whose weights these are for; Saharia et al. (2022) sec. D.1 and F.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.conditioning import Conditioning
from cascade.config import IFUNetConfig
from cascade.models.checks import check_conditions, check_size
from cascade.models.convolution import one_generation
from cascade.models.if_blocks import IFAttention, IFResidualBlock, KeysValues, TextEmbedding, TwoLayers
from cascade.models.network import Network

StepOf = Callable[[Tensor], Tensor]
"""Log SNR (B, 1, 1, 1) -> number of the step (B,), in which the weights were trained to read it."""


@dataclass(frozen=True)
class IFPrepared:
    """What the network computes once per picture rather than once per step.

    embedding: (B, E) from the pooled text and, in stage II, the noise on the smaller picture. text: keys and values
    for each attention, in order. low_res: (B, 3, H, W), upsampled and noised. generation: names the calls that share
    transformed kernels.
    """

    embedding: Tensor
    text: tuple[KeysValues, ...]
    low_res: Tensor | None
    generation: object

    def crop(self, rows: slice, columns: slice) -> IFPrepared:
        """The same for a part of the picture."""
        return self if self.low_res is None else replace(self, low_res=self.low_res[:, :, rows, columns])


class Level(nn.Module):
    """Residual blocks of one size, each perhaps with attention, and the block that leads to the next size."""

    def __init__(self, config: IFUNetConfig, index: int, widths: list[int], change: nn.ModuleDict) -> None:
        """widths: channels that enter each block. change: {"downsamplers": ...}, {"upsamplers": ...} or nothing."""
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
        """The block that leads to the next size."""
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


class IFUNet(Network):
    """(z, log SNR, conditions) -> (B, 2 C, H, W): predicted noise, and in [-1, 1] where its log variance lies."""

    step_of: StepOf

    def __init__(
        self, config: IFUNetConfig, step_of: StepOf, image_channels: int = 3, low_res_channels: int = 0
    ) -> None:
        """low_res_channels: 3 for a super-resolution stage, whose conditions hold the enlarged, noised picture."""
        super().__init__()
        self.config = config
        self.step_of = step_of
        self.low_res_channels = low_res_channels
        first, width = config.channels[0], config.embedding_dim
        self.conv_in = nn.Conv2d(image_channels + low_res_channels, first, 3, padding=1)
        self.time_embedding = TwoLayers(first, width)
        self.class_embedding: TwoLayers | None = TwoLayers(first, width) if low_res_channels else None
        self.encoder_hid_proj = nn.Linear(config.text_dim, config.context_dim)
        self.add_embedding = TextEmbedding(config.text_dim, width, config.pooling_heads)
        self.down_blocks = nn.ModuleList(_down(config, index) for index in range(len(config.channels)))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(_up(config, index) for index in reversed(range(len(config.channels))))
        self.conv_norm_out = nn.GroupNorm(config.groups, first)
        self.conv_out = nn.Conv2d(first, 2 * image_channels, 3, padding=1)

    def prepare(self, cond: Conditioning) -> IFPrepared:
        """Everything that depends on the conditions alone. cond.low_res: (B, 3, H, W), already of z's size.

        The text has no mask here: IF reads what T5 gives for the padding too, up to 77 tokens. Raises ValueError when
        a smaller picture is missing or not expected.
        """
        check_conditions(cond, self.low_res_channels)
        states = cond.text.to(self.conv_in.weight.dtype)
        embedding = self.add_embedding(states)  # (B, E)
        if self.class_embedding is not None and cond.low_res_log_snr is not None:
            embedding = embedding + self.class_embedding(self._sinusoids(cond.low_res_log_snr))
        context = self.encoder_hid_proj(states)  # (B, N, D)
        text = tuple(attention.read_text(context) for attention in self._attentions())
        # A compiled network has no kernels of its own to share, and no way to trace a new object.
        generation = None if torch.compiler.is_compiling() else object()
        return IFPrepared(embedding, text, cond.low_res, generation)

    def forward(self, z: Tensor, log_snr: Tensor, cond: Conditioning | IFPrepared) -> Tensor:
        """z: (B, C, H, W); log_snr: (B, 1, 1, 1) -> (B, 2 C, H, W). H and W: multiples of config.downsampling.

        Between calls with the same prepared conditions, no weight may change. Raises ValueError for any other size.
        """
        if isinstance(cond, Conditioning):  # a single call, for which transforming kernels would cost what it saves
            return self._output(z, log_snr, self.prepare(cond))
        with nullcontext() if torch.compiler.is_compiling() else one_generation(cond.generation):
            return self._output(z, log_snr, cond)

    def _output(self, z: Tensor, log_snr: Tensor, seen: IFPrepared) -> Tensor:
        check_size(z, seen.low_res, self.config.downsampling)
        embedding = F.gelu(self.time_embedding(self._sinusoids(log_snr)) + seen.embedding)  # (B, E)
        text = iter(seen.text)

        def apply(pair: tuple[IFResidualBlock, IFAttention | None], h: Tensor) -> Tensor:
            block, attention = pair
            h = self._run(block, h, embedding)
            return h if attention is None else self._run(attention, h, next(text))

        x = z if seen.low_res is None else torch.cat([z, seen.low_res], dim=1)
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
        """Cosines, then sines, of the number of the step: (B, 1, 1, 1) -> (B, C)."""
        half = self.config.channels[0] // 2
        exponent = -math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=log_snr.device)
        angle = self.step_of(log_snr).float()[:, None] * exponent.exp()
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(self.conv_in.weight.dtype)

    def _levels(self, blocks: nn.ModuleList) -> list[Level]:
        return cast("list[Level]", list(blocks))

    def _attentions(self) -> Iterator[IFAttention]:
        """All attentions in the order in which `forward` meets them."""
        parts: list[Level | Middle] = [*self._levels(self.down_blocks), self.mid_block, *self._levels(self.up_blocks)]
        return (attention for part in parts for _, attention in part.blocks() if attention is not None)


def _down(config: IFUNetConfig, index: int) -> Level:
    channels, before = config.channels[index], config.channels[max(index - 1, 0)]
    widths = [before, *[channels] * (config.blocks[index] - 1)]
    change = nn.ModuleDict()
    if index < len(config.channels) - 1:
        change["downsamplers"] = IFResidualBlock(config, channels, channels, "down")
    return Level(config, index, widths, change)


def _up(config: IFUNetConfig, index: int) -> Level:
    """One block more than on the way down, for the skip that leads into the level."""
    channels, before = config.channels[index], config.channels[max(index - 1, 0)]
    below = config.channels[min(index + 1, len(config.channels) - 1)]
    entering = [below, *[channels] * config.blocks[index]]
    skips = [*[channels] * config.blocks[index], before]
    widths = [width + skip for width, skip in zip(entering, skips, strict=True)]
    change = nn.ModuleDict()
    if index > 0:
        change["upsamplers"] = IFResidualBlock(config, channels, channels, "up")
    return Level(config, index, widths, change)
