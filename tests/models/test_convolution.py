"""The convolution that chooses its algorithm: each gives the same result, and never that of old weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models import convolution as conv
from cascade.models.convolution import LEAST_CHANNELS, Convolution, one_generation
from cascade.models.if_blocks import IFResidualBlock
from cascade.models.if_unet import IFUNetConfig

WIDE = max(LEAST_CHANNELS.values())


def frozen(channels: int = WIDE) -> Convolution:
    return Convolution(channels, channels, 3, padding=1).requires_grad_(False)


def is_transformed(convolution: Convolution, h: Tensor) -> bool:
    """Whether its sums are those of `winograd.convolve`, bit for bit."""
    assert convolution.bias is not None
    kernel = conv.winograd_kernel(convolution.weight.detach())
    with one_generation(is_transformed):
        return torch.equal(convolution(h), conv.winograd_convolve(h, kernel, convolution.bias.detach()))


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
    """Within one generation too, where the change can be seen."""
    torch.manual_seed(0)
    convolution, h = frozen(), torch.randn(1, WIDE, 4, 4)
    assert is_transformed(convolution, h)
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
    with one_generation("this"):
        plain, enlarged = convolution(h), convolution.enlarging(h)
    for ours, exact in (
        (plain, F.conv2d(h.float(), weight, bias, padding=1)),
        (enlarged, F.conv2d(large, weight, bias, padding=1)),
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
    with one_generation("this"):
        quick = block.conv1.enlarging(exact)
    torch.testing.assert_close(
        quick, conv.phase_convolve(exact, conv.phase_kernels(block.conv1.weight), block.conv1.bias), rtol=0, atol=0
    )
    block, h, embedding = block.to(dtype), h.to(dtype), embedding.to(dtype)
    with one_generation("this"):
        quick = block(h, embedding)
    for convolution in (block.conv1, block.conv2):
        convolution.spare_memory = True
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(quick, block(h, embedding), rtol=0, atol=tolerance)


def written_through_data(convolution: Convolution) -> None:
    """As peft merges a low-rank difference."""
    convolution.weight.data += 0.05 * torch.randn_like(convolution.weight)


def written_in_place(convolution: Convolution) -> None:
    convolution.weight.mul_(2)


def assigned(convolution: Convolution) -> None:
    """Other weights, which lie where those of the kernel did, as memory that was freed is given out again."""
    memory = convolution.weight.detach().numpy()
    memory += 0.05
    convolution.load_state_dict({"weight": torch.from_numpy(memory), "bias": convolution.bias}, assign=True)
    convolution.requires_grad_(False)


@pytest.mark.parametrize("change", [written_through_data, written_in_place, assigned])
@pytest.mark.parametrize("inference", [False, True], ids=["usual", "inference mode"])
@pytest.mark.parametrize("enlarges", [False, True], ids=["as it is", "enlarged"])
def test_a_generation_never_meets_the_kernel_of_weights_before_it(
    change: Callable[[Convolution], None], inference: bool, enlarges: bool
) -> None:
    """However they were changed: most ways leave no trace that could be asked for."""
    with torch.inference_mode(inference):
        torch.manual_seed(0)
        convolution, h = frozen(), torch.randn(1, WIDE, 4, 4)
        seen = F.interpolate(h, scale_factor=2.0, mode="nearest") if enlarges else h
        for generation in range(3):
            exact = F.conv2d(seen, convolution.weight, convolution.bias, padding=1)
            with one_generation(generation):
                quick = convolution.enlarging(h) if enlarges else convolution(h)
            torch.testing.assert_close(quick, exact, rtol=0, atol=1e-4)
            assert torch.equal(convolution(seen), exact), "outside of a generation there is no kernel"
            change(convolution)


def test_within_a_generation_a_kernel_is_transformed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    transform = conv.winograd_kernel
    monkeypatch.setattr(conv, "winograd_kernel", lambda weight: made.append(1) or transform(weight))
    convolution, h = frozen(), torch.randn(1, WIDE, 4, 4)
    for generation in ("first", "second"):
        for _ in range(3):
            with one_generation(generation):
                convolution(h)
    assert len(made) == 2


@pytest.mark.parametrize("padding", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("later", [False, True], ids=["made so", "set later"])
@torch.inference_mode()
def test_other_paddings_than_zeros_are_heeded(padding: str, later: bool) -> None:
    """Circular ones make pictures that repeat without a seam; people set them in networks that there are."""
    torch.manual_seed(0)
    convolution = Convolution(WIDE, WIDE, 3, padding=1, padding_mode="zeros" if later else padding)
    convolution.requires_grad_(False).padding_mode = padding
    convolution._reversed_padding_repeated_twice = [1, 1, 1, 1]
    plain = torch.nn.Conv2d(WIDE, WIDE, 3, padding=1, padding_mode=padding)
    plain.load_state_dict(convolution.state_dict())
    block = IFResidualBlock(IFUNetConfig(), WIDE, WIDE, "up").requires_grad_(False)
    block.conv1.padding_mode = padding
    h, embedding = torch.randn(1, WIDE, 4, 4), torch.randn(1, IFUNetConfig().embedding_dim)
    exact = block(h, embedding)
    with one_generation("this"):
        torch.testing.assert_close(convolution(h), plain(h), rtol=0, atol=1e-5)
        torch.testing.assert_close(block(h, embedding), exact, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_a_replaced_way_to_pad_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those do who want a picture that repeats in one direction alone."""
    convolution, h = frozen(), torch.randn(1, WIDE, 4, 4)

    def around(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.pad(F.pad(h, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), weight, bias)

    monkeypatch.setattr(convolution, "_conv_forward", around)
    with one_generation("this"):
        assert torch.equal(convolution(h), around(h, convolution.weight, convolution.bias))


@pytest.mark.parametrize("shape", [(0, WIDE, 4, 4), (1, WIDE, 0, 4), (1, WIDE, 4, 0)])
@torch.inference_mode()
def test_an_empty_batch_or_picture_gives_an_empty_one(shape: tuple[int, ...]) -> None:
    convolution, h = frozen(), torch.zeros(shape)
    with one_generation("this"):
        if len(h) == 0:
            assert convolution(h).shape == shape
            assert IFResidualBlock(IFUNetConfig(), WIDE, WIDE, "up").requires_grad_(False)(
                h, torch.zeros(0, IFUNetConfig().embedding_dim)
            ).shape == (0, WIDE, 8, 8)
    assert conv.winograd_convolve(h, conv.winograd_kernel(convolution.weight), convolution.bias).shape == shape
