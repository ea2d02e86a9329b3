"""The U-Net: shapes, masks, batches, crops, and the values computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.conditioning import Conditioning, pad_text
from cascade.models.attention import Attention
from cascade.models.unet import UNet, UNetConfig

TEXT_DIM = 12
TINY: dict[str, Any] = {
    "channels": (8, 16),
    "blocks": (1, 2),
    "strides": (1, 2),
    "attention": (False, True),
    "groups": 4,
    "head_dim": 8,
    "embedding_dim": 16,
    "text_dim": TEXT_DIM,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "concatenated skips": {},
    "added and scaled skips": {"skips": "add", "skip_scale": 0.5**0.5},
    "efficient": {"strides": (2, 2), "blocks": (1, 3), "norm": "pixel"},
    "patch stem": {"patch": 2},
    "pooled text": {"text": "pooled"},
    "no text": {"text": "none"},
    "two middle blocks": {"middle_blocks": 2},
    "no middle block": {"middle_blocks": 0},
    "equal levels": {"channels": (8, 8), "strides": (1, 1)},
    "resampled by convolution": {"resampling": "conv"},
    "a skip a level": {"skips": "level", "skip_scale": 0.5**0.5},
    "attention once a level": {"attention_after": "level"},
    "text alone": {"self_attention": False},
    "Prince's figure": {"modulation": "add", "resampling": "conv", "text": "pooled"},
}


def awake(network: UNet, seed: int = 0) -> UNet:
    """Give every weight a random value, so that layers which start at zero take part."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) / max(parameter[0].numel(), 4) ** 0.5)
    return network.eval()


def unet(low_res_channels: int = 0, **changes: Any) -> UNet:
    return UNetConfig(**{**TINY, **changes}).build(3, low_res_channels)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(count: int = 2, tokens: int = 5, seed: int = 1) -> Conditioning:
    mask = torch.arange(tokens) < torch.arange(tokens, tokens - count, -1).clamp(min=1)[:, None]
    return Conditioning(normal(count, tokens, TEXT_DIM, seed=seed), mask)


def with_low_res(cond: Conditioning, size: tuple[int, int], level: float = 2.0) -> Conditioning:
    return replace(
        cond, low_res=normal(len(cond), 3, *size, seed=5), low_res_log_snr=torch.full((len(cond), 1, 1, 1), level)
    )


def levels(count: int = 2) -> Tensor:
    return torch.linspace(-3, 4, count)[:, None, None, None]


@pytest.mark.parametrize("name", VARIANTS)
def test_fresh_network_returns_zero(name: str) -> None:
    output = unet(**VARIANTS[name])(normal(2, 3, 16, 16), levels(), conditions())
    assert torch.equal(output, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 12), (20, 4)])
def test_any_size_that_the_depth_allows(name: str, size: tuple[int, int]) -> None:
    network = awake(unet(**VARIANTS[name]))
    height, width = size
    assert height % network.divisor == width % network.divisor == 0
    output = network(normal(2, 3, height, width), levels(), conditions())
    assert output.shape == (2, 3, height, width)
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("size", [(6, 8), (8, 10)])
def test_wrong_size_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"height {size[0]} and width {size[1]} must be multiples of 4"):
        unet(strides=(2, 2))(normal(1, 3, *size), levels(1), conditions(1))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    """A parameter without one would stop training on several processes."""
    for low_res_channels in (0, 3):
        network = awake(unet(low_res_channels, **VARIANTS[name]))
        cond = with_low_res(conditions(), (16, 16)) if low_res_channels else conditions()
        network(normal(2, 3, 16, 16), levels(), cond).square().sum().backward()
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("changes", [{}, {"text": "pooled"}, {"self_attention": False}])
def test_padding_the_text_changes_nothing(changes: dict[str, Any]) -> None:
    network = awake(unet(**changes))
    cond = conditions()
    padded_text, mask = pad_text(cond.text, cond.text_mask, 11)
    rubbish = torch.where(mask[:, :, None], padded_text, 1e3)
    plain = network(normal(2, 3, 16, 16), levels(), cond)
    padded = network(normal(2, 3, 16, 16), levels(), Conditioning(rubbish, mask))
    # Sums over more terms are grouped differently in float32.
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"text": "pooled"}, {"self_attention": False}])
def test_a_text_without_tokens_gives_numbers(changes: dict[str, Any]) -> None:
    network = awake(unet(**changes))
    cond = replace(conditions(), text_mask=torch.zeros(2, 5, dtype=torch.bool))
    output = network(normal(2, 3, 16, 16), levels(), cond)
    output.sum().backward()
    assert bool(torch.isfinite(output).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("changes", [{}, {"text": "pooled"}, {"self_attention": False}])
def test_text_matters(changes: dict[str, Any]) -> None:
    network = awake(unet(**changes))
    one, other = (network(normal(2, 3, 16, 16), levels(), conditions(seed=seed)) for seed in (1, 2))
    assert (one - other).abs().max() > 1e-2


def test_a_network_without_text_does_not_see_it() -> None:
    network = awake(unet(text="none"))
    one, other = (network(normal(2, 3, 16, 16), levels(), conditions(seed=seed)) for seed in (1, 2))
    assert torch.equal(one, other)


def test_noise_level_matters() -> None:
    network = awake(unet())
    one, other = (network(normal(2, 3, 16, 16), levels() + shift, conditions()) for shift in (0.0, 0.3))
    assert (one - other).abs().max() > 1e-2


def test_smaller_picture_and_its_noise_level_matter() -> None:
    network = awake(unet(3))
    cond = with_low_res(conditions(), (16, 16))
    z = normal(2, 3, 16, 16)
    plain = network(z, levels(), cond)
    assert cond.low_res is not None
    for changed in (replace(cond, low_res=cond.low_res + 0.5), with_low_res(conditions(), (16, 16), level=4.0)):
        assert (network(z, levels(), changed) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("low_res_channels", [0, 3])
def test_prepared_conditions_give_the_same_output(low_res_channels: int) -> None:
    network = awake(unet(low_res_channels))
    cond = with_low_res(conditions(), (16, 16)) if low_res_channels else conditions()
    z = normal(2, 3, 16, 16)
    assert torch.equal(network(z, levels(), network.prepare(cond)), network(z, levels(), cond))


def test_text_is_read_once_per_picture_not_once_per_step() -> None:
    network = awake(unet())
    reads: list[nn.Module] = []
    layers = [a.text_key_value for a in network.modules() if isinstance(a, Attention)]
    for layer in [*layers, network.text_pooling]:
        assert layer is not None
        layer.register_forward_hook(lambda module, *_: reads.append(module))
    prepared = network.prepare(conditions())
    for step in range(3):
        network(normal(2, 3, 16, 16, seed=step), levels(), prepared)
    assert len(layers) == 4  # after two blocks down and two up at the coarse level; the last middle block has none
    assert len(reads) == len(layers) + 1


@pytest.mark.parametrize("name", VARIANTS)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    network = awake(unet(**VARIANTS[name]))
    z, cond = normal(3, 3, 16, 16), conditions(3)
    together = network(z, levels(3), cond)
    for index in range(3):
        alone = Conditioning(cond.text[index : index + 1], cond.text_mask[index : index + 1])
        output = network(z[index : index + 1], levels(3)[index : index + 1], alone)
        # Matrix products group their sums by the batch.
        torch.testing.assert_close(output, together[index : index + 1], rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = awake(unet())
        network.activation_checkpointing = checkpointing
        network(normal(2, 3, 16, 16), levels(), conditions()).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_activation_checkpointing_recomputes_the_blocks() -> None:
    network = awake(unet())
    network.activation_checkpointing = True
    calls: list[int] = []
    network.levels[0].encode[0].register_forward_pre_hook(lambda *_: calls.append(1))
    network(normal(2, 3, 16, 16), levels(), conditions()).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(("kind", "same"), [("pixel", True), ("group", False)])
def test_pixel_norm_makes_the_interior_of_a_crop_that_of_the_whole(kind: str, same: bool) -> None:
    network = awake(unet(strides=(2, 2), blocks=(1, 1), attention=(False, False), norm=kind))
    z = normal(1, 3, 112, 112)
    cond = conditions(1)
    whole = network(z, levels(1), cond)[:, :, 12:100, 12:100]
    crop = network(z[:, :, 12:100, 12:100], levels(1), cond)
    # Two 3x3 convolutions a block reach 4 pixels at stride 2 (two blocks) and 8 at stride 4 (three), one each in
    # stem and head: 34, and up to 3 for the place within a stride.
    inside = (..., slice(40, -40), slice(40, -40))
    difference = (whole[inside] - crop[inside]).abs().max().item()
    assert (difference < 1e-5) is same
    assert (whole[..., 0, 0] - crop[..., 0, 0]).abs().max() > 1e-3  # at its edge a crop sees less


def test_moving_the_picture_by_a_whole_stride_moves_the_output() -> None:
    network = awake(unet(strides=(2, 2), blocks=(1, 1), attention=(False, False), norm="pixel"))
    z = normal(1, 3, 112, 112)
    plain = network(z, levels(1), conditions(1))
    moved = network(z.roll((4, -8), (2, 3)), levels(1), conditions(1)).roll((-4, 8), (2, 3))
    inside = (..., slice(52, -52), slice(52, -52))  # out of reach of the edges, at which `roll` wraps around
    torch.testing.assert_close(moved[inside], plain[inside], rtol=1e-5, atol=1e-5)


def test_super_resolution_needs_the_smaller_picture() -> None:
    for cond in (conditions(), replace(with_low_res(conditions(), (16, 16)), low_res_log_snr=None)):
        with pytest.raises(ValueError, match="needs low_res and low_res_log_snr"):
            unet(3)(normal(2, 3, 16, 16), levels(), cond)


def test_a_base_network_refuses_a_smaller_picture() -> None:
    with pytest.raises(ValueError, match="leave low_res out"):
        unet()(normal(2, 3, 16, 16), levels(), with_low_res(conditions(), (16, 16)))


def test_the_smaller_picture_must_have_the_size_of_z() -> None:
    with pytest.raises(ValueError, match="low_res is 8 x 16, the noisy picture 16 x 16"):
        unet(3)(normal(2, 3, 16, 16), levels(), with_low_res(conditions(), (8, 16)))


def test_additive_skips_are_scaled() -> None:
    plain, scaled = (awake(unet(skips="add", skip_scale=scale)) for scale in (1.0, 0.5))
    z = normal(2, 3, 16, 16)
    assert not torch.allclose(plain(z, levels(), conditions()), scaled(z, levels(), conditions()))


def test_no_self_attention_at_the_finest_level() -> None:
    assert all(block.attention is None for block in unet().levels[0].encode)
    assert all(block.attention is not None for block in unet().levels[1].encode)


def test_attention_once_a_level_comes_after_its_last_block() -> None:
    level = unet(blocks=(1, 3), attention_after="level").levels[1]
    for blocks in (level.encode, level.decode):
        assert [block.attention is not None for block in blocks] == [False, False, True]


def test_text_alone_is_asked_by_each_pixel_for_itself() -> None:
    """No pixel's answer depends on another pixel, which self-attention's does."""
    attention = Attention(8, 8, TEXT_DIM, "pixel", 1, sees_picture=False)
    torch.nn.init.normal_(attention.out.weight)
    cond = conditions(1)
    text, visible = attention.read_text(cond.text), cond.text_mask[:, None, None, :]
    h = normal(1, 8, 4, 4)
    changed = h.clone()
    changed[..., 0, 0] += 1
    differs = (attention(changed, text, visible) != attention(h, text, visible)).any(dim=1)[0]
    assert differs.nonzero().tolist() == [[0, 0]]


def test_text_alone_needs_a_text_that_attention_reads() -> None:
    with pytest.raises(ValueError, match="self_attention: false attends to text alone, but text: pooled"):
        unet(self_attention=False, text="pooled")


def test_a_skip_a_level_is_added_once_before_its_first_block_on_the_way_up() -> None:
    """Written out for one level of two blocks."""
    one_level = {"channels": (8,), "blocks": (2,), "strides": (1,), "attention": (False,), "middle_blocks": 0}
    network = awake(unet(**one_level, skips="level", skip_scale=0.5))
    z, cond, level = normal(2, 3, 8, 8), conditions(), network.levels[0]
    embedding = torch.nn.functional.silu(network.noise_level(levels()) + network.prepare(cond).embedding)
    h = network.stem(z)
    for block in level.encode:
        h = block(h, embedding, None, None)
    h = h + 0.5 * h
    for block in level.decode:
        h = block(h, embedding, None, None)
    expected = network.head(torch.nn.functional.silu(network.head_norm(h)))
    torch.testing.assert_close(network(z, levels(), cond), expected)


def test_resampling_by_convolution_strides_down_and_enlarges_before_it_convolves_up() -> None:
    level = unet(resampling="conv").levels[1]
    h = normal(1, 8, 8, 8)
    down = level.down(h)
    torch.testing.assert_close(down, nn.functional.conv2d(h, level.down.conv.weight, level.down.conv.bias, 2, 1))
    repeated = down.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(level.up(down), level.up.conv(repeated))


def test_dropout_acts_in_training_only_and_at_attending_levels_only() -> None:
    network = awake(unet(dropout=0.5))
    z, cond = normal(2, 3, 16, 16), conditions()
    assert torch.equal(network(z, levels(), cond), network(z, levels(), cond))
    network.train()
    assert not torch.equal(network(z, levels(), cond), network(z, levels(), cond))
    assert network.levels[0].encode[0].residual.dropout.p == 0
    assert network.levels[1].encode[0].residual.dropout.p == 0.5


def test_a_step_without_gradients_equals_one_with_them() -> None:
    """Without gradients SiLU works in place; nothing else may see that."""
    network = awake(unet())
    z, cond = normal(2, 3, 16, 16), conditions()
    with_gradients = network(z, levels(), cond).detach()
    before = z.clone()
    with torch.no_grad():
        torch.testing.assert_close(network(z, levels(), cond), with_gradients, rtol=0, atol=0)
    assert torch.equal(z, before)
