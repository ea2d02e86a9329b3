"""The levels of DeepFloyd IF's U-Net, with the parameter names of its published weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

from cascade.models.if_blocks import IFAttention, IFResidualBlock

if TYPE_CHECKING:  # the settings are defined next to the network, which imports this module
    from cascade.models.if_unet import IFUNetConfig


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
