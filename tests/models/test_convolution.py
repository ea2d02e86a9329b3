"""The convolution that chooses its way: the same picture by each, and never that of old weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.config import IFUNetConfig
from cascade.models import phases, winograd
from cascade.models.convolution import LEAST_CHANNELS, Convolution
from cascade.models.if_blocks import IFResidualBlock

WIDE = max(LEAST_CHANNELS.values())


def frozen(channels: int = WIDE) -> Convolution:
    return Convolution(channels, channels, 3, padding=1).requires_grad_(False)


def is_transformed(convolution: Convolution, h: Tensor) -> bool:
    """Whether its sums are those of `winograd.convolve`, bit for bit."""
    assert convolution.bias is not None
    kernel = winograd.transform_kernel(convolution.weight.detach())
    return torch.equal(convolution(h), winograd.convolve(h, kernel, convolution.bias.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_frozen_wide_ones_at_even_sizes_are_transformed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h = torch.randn(1, WIDE, 8, 8).to(dtype)
    assert is_transformed(frozen().to(dtype), h)
    assert frozen().transformed_bytes(dtype) == dtype.itemsize * 16 * WIDE**2
    trained = frozen().to(dtype)
    trained.bias.requires_grad_(True)
    assert not is_transformed(trained, h)
    assert frozen(LEAST_CHANNELS[dtype] - 32).transformed_bytes(dtype) == 0
    sparing = frozen().to(dtype)
    sparing.spare_memory = True
    assert not is_transformed(sparing, h)
    odd = frozen().to(dtype)(h[..., :7])
    assert odd.shape == (1, WIDE, 8, 7)


def test_changed_weights_are_transformed_anew() -> None:
    torch.manual_seed(0)
    convolution, h = frozen(), torch.randn(1, WIDE, 4, 4)
    convolution(h)
    convolution.weight.mul_(2)
    assert is_transformed(convolution, h)
    convolution.load_state_dict(frozen().state_dict())
    assert is_transformed(convolution, h)
    assert is_transformed(convolution.bfloat16(), h.bfloat16())
    assert set(convolution.state_dict()) == {"weight", "bias"}


def test_in_bfloat16_each_way_stays_within_a_few_roundings_of_the_exact_picture() -> None:
    """Numbers that are rounded once or twice more; 2^-9 is the largest relative error of one rounding."""
    torch.manual_seed(0)
    convolution, h = frozen().bfloat16(), F.gelu(torch.randn(2, WIDE, 16, 16)).bfloat16()
    weight, bias = convolution.weight.float(), convolution.bias.float()
    large = F.interpolate(h.float(), scale_factor=2.0, mode="nearest")
    for ours, exact in (
        (convolution(h), F.conv2d(h.float(), weight, bias, padding=1)),
        (convolution.enlarging(h), F.conv2d(large, weight, bias, padding=1)),
    ):
        error = (ours.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 4 * 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_block_that_enlarges_gives_the_same_with_and_without(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = IFResidualBlock(IFUNetConfig(), WIDE, WIDE, "up").requires_grad_(False)
    h, embedding = torch.randn(1, WIDE, 4, 4), torch.randn(1, IFUNetConfig().embedding_dim)
    exact = F.gelu(block.norm1(h))
    assert isinstance(block.conv1, Convolution)
    quick = block.conv1.enlarging(exact)
    torch.testing.assert_close(
        quick, phases.convolve(exact, phases.transform_kernel(block.conv1.weight), block.conv1.bias), rtol=0, atol=0
    )
    block, h, embedding = block.to(dtype), h.to(dtype), embedding.to(dtype)
    quick = block(h, embedding)
    for convolution in (block.conv1, block.conv2):
        convolution.spare_memory = True
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(quick, block(h, embedding), rtol=0, atol=tolerance)
