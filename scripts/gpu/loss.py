"""The loss of a view, its noise levels, and the errors that measure a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.diffusion.noise import diffuse, target, to_x
from cascade.models.unet import UNet
from gpu.network import call
from gpu.views import View

PROBED = (-4, -2, 0, 2, 4, 6, 8)
"""Log SNR at which the error of x_hat is measured."""
FLAT = 4 / 255
"""Differences of neighbours below this, in [-1, 1], are flat: 2 of 255."""


@dataclass(frozen=True)
class Levels:
    """Log SNR of a batch: normal, stratified over the batch, clipped to `low` and `high`."""

    mean: float
    std: float
    low: float = -11.0
    high: float = 12.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(B, 1, 1, 1), in random order."""
        device = generator.device
        u = torch.arange(count, device=device) + torch.rand(count, device=device, generator=generator)
        u = u[torch.randperm(count, device=device, generator=generator)].double() / count
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).float()
        return (self.mean + self.std * normal).clamp(self.low, self.high)[:, None, None, None]


def loss_of(net: UNet, view: View, log_snr: Tensor, eps: Tensor, flatness: float = 0.0) -> Tensor:
    """(B,): squared error of v and, where log SNR > 0, `flatness` times the error of x_hat's gradients.

    The second, unlike total variation, is zero for the true picture, and has triple weight where that is flat: edges
    should keep their steepness, and flat areas should stay flat.
    """
    z = diffuse(view.x, eps, log_snr).contiguous(memory_format=torch.channels_last)
    v = call(net, z, log_snr, view.cond)
    loss = (v - target("v", view.x, eps, log_snr)).square().mean((1, 2, 3))
    if flatness:
        x_hat = to_x("v", v, z, log_snr)
        loss = loss + flatness * torch.where(log_snr.flatten() > 0, gradient_error(x_hat, view.x), 0.0)
    return loss


def gradient_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """(B,): mean absolute error of the differences between neighbours, both ways, three times where x is flat."""
    total = torch.zeros(len(x), device=x.device)
    for dim in (2, 3):
        true = x.diff(dim=dim)
        weight = torch.where(true.abs() < FLAT, 3.0, 1.0)
        total = total + (weight * (x_hat.diff(dim=dim) - true).abs()).mean((1, 2, 3))
    return total


@dataclass(frozen=True)
class Measured:
    """loss: mean over the levels of training. errors: RMS of x_hat - x at PROBED."""

    loss: float
    errors: tuple[float, ...]

    def __str__(self) -> str:
        errors = " ".join(f"{level}:{error:.4f}" for level, error in zip(PROBED, self.errors, strict=True))
        return f"loss {self.loss:.5f}, error by log SNR {errors}"


@torch.inference_mode()
def measured(net: UNet, view: View, levels: Levels, batch: int = 128) -> Measured:
    """Loss and errors of the network on these views, with fixed noise."""
    device = view.x.device
    generator = torch.Generator(device).manual_seed(2)
    parts = view.split(batch)
    total = torch.zeros((), device=device)
    for part in parts:
        log_snr = levels.draw(len(part.x), generator)
        total += loss_of(net, part, log_snr, torch.randn(part.x.shape, device=device, generator=generator)).sum()
    squares = torch.zeros(len(PROBED), device=device)
    for place, value in enumerate(PROBED):
        for part in parts:
            level = torch.full((len(part.x), 1, 1, 1), float(value), device=device)
            z = diffuse(part.x, torch.randn(part.x.shape, device=device, generator=generator), level)
            squares[place] += (to_x("v", call(net, z, level, part.cond), z, level) - part.x).square().sum()
    errors = (squares / view.x.numel()).sqrt().tolist()
    return Measured(float(total) / len(view.x), tuple(errors))
