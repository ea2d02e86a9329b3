"""The parts of the networks, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models.attention import Attention
from cascade.models.blocks import Normalize, ResidualBlock, depth_to_space, group_norm, space_to_depth
from cascade.models.conditioned import LONGEST_PERIOD, SHORTEST_PERIOD, TextPooling, sinusoidal


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sinusoids_have_the_stated_periods() -> None:
    at = torch.tensor([1.7, 1.7 + SHORTEST_PERIOD, 1.7 + LONGEST_PERIOD])[:, None, None, None]
    now, short, long = sinusoidal(at, 16)
    # float32 angles of up to 2000 radians are right to 1e-4
    torch.testing.assert_close(now[[0, 8]], short[[0, 8]], rtol=0, atol=1e-3)
    torch.testing.assert_close(now[[7, 15]], long[[7, 15]], rtol=0, atol=1e-3)
    assert now[0].item() == pytest.approx(math.sin(2 * math.pi * 1.7 / SHORTEST_PERIOD), abs=1e-4)


def test_sinusoids_tell_all_levels_apart() -> None:
    features = sinusoidal(torch.linspace(-20, 20, 2001)[:, None, None, None], 32)
    distances = torch.cdist(features, features) + 10 * torch.eye(2001)
    assert distances.min() > 0.05


def test_pixel_norm_is_a_layer_norm_of_each_pixel() -> None:
    h = normal(2, 6, 3, 5)
    expected = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(Normalize(6, "pixel", 32)(h), expected)


def test_group_norm_is_torchs() -> None:
    h = normal(2, 8, 3, 5)
    torch.testing.assert_close(Normalize(8, "group", 4)(h), F.group_norm(h, 4))


def test_fresh_residual_block_is_its_shortcut() -> None:
    h = normal(2, 8, 4, 4)
    assert torch.equal(ResidualBlock(8, 8, 16, "group", 4, 0.0)(h, normal(2, 16)), h)
    wider = ResidualBlock(8, 12, 16, "group", 4, 0.0)
    torch.testing.assert_close(wider(h, normal(2, 16)), wider.shortcut(h))


def test_fresh_attention_changes_nothing() -> None:
    h = normal(2, 16, 3, 5)
    attention = Attention(16, 8, 12, "group", 4)
    assert torch.equal(attention(h, attention.read_text(normal(2, 4, 12)), None), h)


def test_attention_is_softmax_over_pixels_and_visible_tokens() -> None:
    """Written out for one head, with loops in place of reshapes."""
    attention = Attention(4, 4, 6, "pixel", 1)
    torch.nn.init.normal_(attention.out.weight, generator=torch.Generator().manual_seed(3))
    h, text, mask = normal(1, 4, 2, 3), normal(1, 3, 6, seed=1), torch.tensor([[True, False, True]])
    pixels = attention.norm(h)[0].flatten(1).T  # (6, 4)
    query, key, value = attention.qkv(pixels).chunk(3, dim=1)
    assert attention.text_key_value is not None
    text_key, text_value = attention.text_key_value(text[0][mask[0]]).chunk(2, dim=1)
    weights = (query @ torch.cat([key, text_key]).T / math.sqrt(4)).softmax(1)
    expected = h + attention.out(weights @ torch.cat([value, text_value])).T.reshape(1, 4, 2, 3)
    found = attention(h, attention.read_text(text), mask[:, None, None, :])
    torch.testing.assert_close(found, expected)


def test_pooled_text_of_no_token_is_finite_and_does_not_see_padding() -> None:
    pooling, mask = TextPooling(12, 16), torch.zeros(2, 4, dtype=torch.bool)
    pooled = pooling(normal(2, 4, 12), mask)
    assert bool(torch.isfinite(pooled).all())
    torch.testing.assert_close(pooled, pooling(normal(2, 4, 12, seed=1), mask))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_depth_to_space_inverts_space_to_depth(factor: int) -> None:
    x = normal(2, 3, 8, 12)
    assert space_to_depth(x, factor).shape == (2, 3 * factor**2, 8 // factor, 12 // factor)
    assert torch.equal(depth_to_space(space_to_depth(x, factor), factor), x)


def test_gradient_of_group_norm_is_that_of_finite_differences() -> None:
    h, weight, bias = normal(2, 6, 3, 5).double(), normal(6, seed=1).double(), normal(6, seed=2).double()
    h = h.contiguous(memory_format=torch.channels_last)
    inputs = [tensor.requires_grad_() for tensor in (h, weight, bias)]
    assert type(group_norm(inputs[0], 3, *inputs[1:]).grad_fn).__name__ == "_GroupNormBackward"
    assert torch.autograd.gradcheck(lambda *given: group_norm(given[0], 3, *given[1:]), inputs)


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_in_bfloat16_the_gradient_of_group_norm_errs_no_more_than_torchs(mean: float) -> None:
    """Where a group's mean is 100 times its spread, products of h itself were off by a fifth."""
    h = (normal(4, 64, 32, 32) + mean).bfloat16().contiguous(memory_format=torch.channels_last)
    upstream = normal(4, 64, 32, 32, seed=1).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = (1 + 0.1 * normal(64, seed=2)).bfloat16(), torch.zeros(64).bfloat16()

    def gradients(norm: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [part.detach().clone().to(dtype).requires_grad_() for part in (h, weight, bias)]
        norm(inputs[0], 8, *inputs[1:]).backward(upstream.to(dtype))
        return [part.grad.double() for part in inputs if part.grad is not None]

    exact = gradients(F.group_norm, torch.float64)
    ours, torchs = (gradients(norm, torch.bfloat16) for norm in (group_norm, F.group_norm))
    for name, own, theirs, true in zip(("h", "weight", "bias"), ours, torchs, exact, strict=True):
        # A product is rounded once more than in torch's, to 2^-9 of itself: all there is without a mean.
        assert (own - true).norm() < 1.1 * (theirs - true).norm() + 2e-3 * true.norm(), name


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((1, 64, 8, 8), (1, 1, 512, 64)), ((4, 64, 1, 1), (64, 1, 1, 1)), ((1, 64, 1, 1), (7, 1, 5, 3))],
)
def test_group_norm_takes_any_step_over_a_dimension_of_one(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    plain = normal(*shape).requires_grad_()
    odd = torch.empty_strided(shape, strides).copy_(plain.detach()).requires_grad_()
    assert odd.is_contiguous(memory_format=torch.channels_last), "then it is ours, whatever the steps"
    for h in (plain, odd):
        (group_norm(h, 32, torch.ones(64), torch.zeros(64)) * normal(*shape, seed=1)).sum().backward()
    torch.testing.assert_close(odd.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_has_torchs_gradient_in_either_layout(dtype: torch.dtype) -> None:
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        h = (normal(4, 64, 8, 8) + 3).to(dtype).contiguous(memory_format=layout).requires_grad_()
        weight, bias = normal(64, seed=1).requires_grad_(), normal(64, seed=2).requires_grad_()
        (group_norm(h, 32, weight, bias) * normal(4, 64, 8, 8, seed=3).to(dtype)).sum().backward()
        gradients.append([h.grad, weight.grad, bias.grad])
    for torchs, ours in zip(*gradients, strict=True):
        # bfloat16 has 8 bits, float32 24, and sums run over 64 to 512 numbers
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        assert (ours - torchs).norm() < tolerance * torchs.norm()
