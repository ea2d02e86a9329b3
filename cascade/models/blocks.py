"""Input stacking, residual blocks, the layers between levels, and a GroupNorm whose gradient is fast on a CPU."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- group norm ------------------------------------------------------------------------------------------------------
# GroupNorm whose gradient is fast on a CPU.

EPSILON = 1e-5


def group_norm(h: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W), normalized over each group's channels and all pixels (Wu & He 2018).

    On a CPU, for a channels-last picture, torch's backward pass takes 4 to 30 times as long as its forward pass, up to
    a seventh of a training step; `_GroupNorm` replaces it there.
    """
    trains = torch.is_grad_enabled() and h.requires_grad and not torch.compiler.is_compiling()
    if trains and h.device.type == "cpu" and h.is_contiguous(memory_format=torch.channels_last):
        out: Tensor = _GroupNorm.apply(h, groups, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.group_norm(h, groups, weight, bias, EPSILON)


class _GroupNorm(torch.autograd.Function):
    """torch's forward pass, with a backward pass of a few sweeps over memory.

    With n numbers in a group, g the gradient times the weight, and x_hat the normalized h:
    dh = rstd (g - mean(g) - x_hat mean(g x_hat)), which is linear in the gradient and h, with coefficients by channel.
    The group's mean is subtracted from h first, a difference that bfloat16 represents exactly where the mean is large:
    products of h itself would be rounded relative to the mean instead of the spread.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
        batch, channels, height, width = h.shape
        # Any stride is valid for a dimension of size one, but torch's kernel recognizes the layout by the usual one.
        h = h.as_strided(h.shape, (channels * height * width, 1, channels * width, channels), h.storage_offset())
        out, mean, rstd = torch.native_group_norm(h, weight, bias, batch, channels, height * width, groups, EPSILON)
        ctx.save_for_backward(h, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        h, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = h.shape
        exact = mean.dtype if mean.dtype == torch.float64 else torch.float32
        scale = weight.to(exact).view(1, mean.shape[1], -1)  # (1, G, C / G)
        count = height * width * scale.shape[2]

        def by_channel(value: Tensor) -> Tensor:
            """(B, G, 1 or C / G) -> (B, 1, C)."""
            return value.expand(batch, *scale.shape[1:]).reshape(batch, 1, channels).to(h.dtype)

        mean, rstd = mean.to(exact)[:, :, None], rstd.to(exact)[:, :, None]  # (B, G, 1)
        centred = h.permute(0, 2, 3, 1).reshape(batch, -1, channels)  # (B, HW, C), a view
        rounded = torch.zeros_like(mean)
        if h.dtype != exact:
            rounded = mean.to(h.dtype)  # subtracting this value from h is exact
            centred = centred - by_channel(rounded)
        gradient = gradients[0].permute(0, 2, 3, 1).reshape(batch, -1, channels)
        total = gradient.sum(1, dtype=exact).view(batch, *scale.shape[1:])  # (B, G, C / G)
        along = (gradient * centred).sum(1, dtype=exact).view(batch, *scale.shape[1:])
        along = (along - (mean - rounded) * total) * rstd  # sums of the gradient times x_hat
        mean_g = (scale * total).sum(2, keepdim=True) / count
        mean_gx = (scale * along).sum(2, keepdim=True) / count
        of_h = -(rstd**2) * mean_gx
        constant = -rstd * mean_g - of_h * (mean - rounded)
        dh = torch.addcmul(by_channel(constant), centred, by_channel(of_h)).addcmul_(gradient, by_channel(rstd * scale))
        dh = dh.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return dh, None, along.sum(0).flatten().to(weight.dtype), total.sum(0).flatten().to(weight.dtype)


# --- blocks ----------------------------------------------------------------------------------------------------------

ModuleT = TypeVar("ModuleT", nn.Linear, nn.Conv2d)


def zero_init(layer: ModuleT) -> ModuleT:
    """Initialize a layer to zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def silu(h: Tensor) -> Tensor:
    """SiLU, in place where no gradient needs the input: at 1024 px memory traffic is the cost."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


class Normalize(nn.Module):
    """GroupNorm over the picture, or LayerNorm over the channels of each pixel.

    LayerNorm takes no statistics over positions, so it computes the same function on a crop as on the whole picture
    (Chu et al. 2022, TLC, measure the harm done by GroupNorm).
    """

    def __init__(self, channels: int, kind: str, groups: int) -> None:
        super().__init__()
        self.channels = channels
        self.groups = groups if kind == "group" else None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.groups is not None:
            norm = group_norm if torch.is_grad_enabled() else F.group_norm  # only the gradients differ
            return norm(h, self.groups, self.weight, self.bias)
        # A view when h is channels-last, as it is here; torch has a fused kernel for LayerNorm only.
        pixels = h.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, (self.channels,), self.weight, self.bias).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """h + conv(silu(scale-shift(norm(conv(silu(norm(h))))))), scale and shift from the embedding.

    Source: the scale-shift of Dhariwal & Nichol (2021) in place of the sum of `AddingResidualBlock`.
    """

    def __init__(
        self, channels_in: int, channels: int, embedding_dim: int, norm: str, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_in = Normalize(channels_in, norm, groups)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.embed = nn.Linear(embedding_dim, 2 * channels)
        self.norm_out = Normalize(channels, norm, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C_in, H, W); embedding: (B, E), after its SiLU -> (B, C, H, W)."""
        scale, shift = self.embed(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        inner = self.conv_in(silu(self.norm_in(h)))
        inner = torch.addcmul(shift, self.norm_out(inner), 1 + scale)
        return self.shortcut(h) + self.conv_out(self.dropout(silu(inner)))


class AddingResidualBlock(ResidualBlock):
    """h + conv(silu(norm(conv(silu(norm(h))) + embedding))): the embedding is added at every pixel.

    Source: Prince (2023) fig. 18.9, "adding the result to the channels at every spatial position".
    """

    def __init__(
        self, channels_in: int, channels: int, embedding_dim: int, norm: str, groups: int, dropout: float
    ) -> None:
        super().__init__(channels_in, channels, embedding_dim, norm, groups, dropout)
        self.embed = nn.Linear(embedding_dim, channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C_in, H, W); embedding: (B, E), after its SiLU -> (B, C, H, W)."""
        inner = self.conv_in(silu(self.norm_in(h))) + self.embed(embedding)[:, :, None, None]
        return self.shortcut(h) + self.conv_out(self.dropout(silu(self.norm_out(inner))))


class Downsample(nn.Module):
    """Layer to the next coarser level: space-to-depth, which loses nothing, and a 1x1 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.mix = nn.Conv2d(channels_in * stride**2, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H / stride, W / stride)."""
        return self.mix(space_to_depth(h, self.stride))


class Upsample(nn.Module):
    """Layer back to the finer level: a 1x1 convolution and depth-to-space."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.mix = nn.Conv2d(channels_in, channels * stride**2, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H stride, W stride)."""
        return depth_to_space(self.mix(h), self.stride)


class StridedDownsample(nn.Module):
    """Layer to the next coarser level: a strided 3x3 convolution. Source: Imagen's Efficient U-Net, fig. A.28."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H / stride, W / stride)."""
        return self.conv(h)


class EnlargingUpsample(nn.Module):
    """Layer back to the finer level: nearest-neighbour enlargement and a 3x3 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H stride, W stride)."""
        return self.conv(F.interpolate(h, scale_factor=self.stride, mode="nearest") if self.stride > 1 else h)


def stacked(z: Tensor, low_res: Tensor | None, step: int) -> Tensor:
    """The noisy picture and the upsampled smaller one, stacked as channels: (B, C, H, W) -> (B, C + C', H, W).

    step: H and W must be multiples of it. Raises ValueError for other sizes.
    """
    height, width = z.shape[-2:]
    if height % step or width % step:
        raise ValueError(
            f"height {height} and width {width} must be multiples of {step}, by which this network divides them"
        )
    if low_res is None:
        return z
    if low_res.shape[-2:] != z.shape[-2:]:
        raise ValueError(
            f"low_res is {low_res.shape[-2]} x {low_res.shape[-1]}, the noisy picture {height} x {width};"
            " upsample it to the same size"
        )
    return torch.cat([z, low_res], dim=1)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C factor^2, H / factor, W / factor)."""
    return x if factor == 1 else F.pixel_unshuffle(x, factor)


def depth_to_space(x: Tensor, factor: int) -> Tensor:
    """(B, C factor^2, H, W) -> (B, C, H factor, W factor)."""
    return x if factor == 1 else F.pixel_shuffle(x, factor)
