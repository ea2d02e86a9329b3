"""A picture drawn in squares is the picture drawn whole; only memory differs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers_model import tiny_stage, tiny_stage_config
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config.stage import ModelConfig, SquaredCosineSchedule, StageConfig
from cascade.diffusion.noise import noise_like
from cascade.errors import CascadeError
from cascade.models.if_unet import IFUNetConfig
from cascade.models.network import in_tiles, tiles
from cascade.models.unet import UNetConfig
from cascade.resources.memory import LiveBytes
from cascade.seeds import generator
from cascade.stage import Stage, build_network

NETWORKS = {
    "patch": UNetConfig(channels=(8,), blocks=(1,), strides=(1,), attention=(False,), patch=4, norm="pixel"),
    "levels": UNetConfig(
        channels=(8, 8, 8), blocks=(1, 1, 2), strides=(1, 2, 2), attention=(False,) * 3, patch=2, norm="pixel"
    ),
    "stride first": UNetConfig(channels=(8, 8), blocks=(1, 1), strides=(2, 2), attention=(False,) * 2, norm="pixel"),
    "resampled by convolution": UNetConfig(
        channels=(8, 8), blocks=(1, 1), strides=(2, 2), attention=(False,) * 2, norm="pixel", resampling="conv"
    ),
}


IF_NETWORK = IFUNetConfig(
    channels=(32,),
    blocks=(1,),
    attention=(True,),
    embedding_dim=32,
    text_dim=32,
    context_dim=32,
    head_dim=8,
    pooling_heads=4,
)


def convolutional_stage(model: UNetConfig, path: str = "residual") -> Stage:
    """A super-resolution stage with random weights everywhere, no attention and no norm over the picture."""
    model = model.model_copy(update={"text": "pooled", "text_dim": 8, "embedding_dim": 16, "skips": "add"})
    return tiny_stage(tiny_stage_config("sr64", 64, 16, model=model, path=path))


def drawn(stage: Stage, height: int, width: int, tile: int | None) -> Tensor:
    """Two pictures in two steps with guidance, from the same noise."""
    rng = [generator(index, "tiles") for index in range(2)]
    low = noise_like(torch.empty(2, 3, height // 4, width // 4), rng).clamp(-1, 1)
    text, mask = noise_like(torch.empty(2, 4, 8), rng), torch.ones(2, 4, dtype=torch.bool)
    cond = Conditioning(text, mask, low, torch.full((2, 1, 1, 1), 5.0))
    null = cond.with_text(torch.zeros_like(text), mask)
    with torch.inference_mode():
        z = noise_like(torch.empty(2, 3, height, width), rng)
        return stage.tiled(tile).sample(cond, null, z, rng)


def test_attention_to_text_alone_is_drawn_in_tiles_too() -> None:
    attends = {"attention": (False, True), "self_attention": False, "text": "attention", "head_dim": 8}
    plain = convolutional_stage(NETWORKS["stride first"]).config
    stage = tiny_stage(plain.model_copy(update={"model": plain.model.model_copy(update=attends)}))
    assert (drawn(stage, 64, 96, None) - drawn(stage, 64, 96, 32)).abs().max() < 2e-5


def test_tiles_cover_every_pixel_once_and_see_their_margin_inside_the_picture() -> None:
    covered = torch.zeros(1, 1, 50, 33)
    for tile in tiles(50, 33, 16, 8):
        covered[:, :, *tile.kept] += 1
        for kept, seen, end in zip(tile.kept, tile.seen, (50, 33), strict=True):
            assert (seen.start, seen.stop) == (max(kept.start - 8, 0), min(kept.stop + 8, end))
    assert bool((covered == 1).all())


def test_what_tiles_answer_is_put_together_in_place() -> None:
    picture = torch.rand(2, 3, 20, 12)
    assert torch.equal(in_tiles(lambda tile: tile.cut(picture), (20, 12), 8, 4), picture)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("path", ["residual", "picture"])
def test_a_picture_in_tiles_equals_the_whole_up_to_rounding(name: str, path: str) -> None:
    stage = convolutional_stage(NETWORKS[name], path)
    whole, tiled = drawn(stage, 96, 144, None), drawn(stage, 96, 144, 24 if name == "patch" else 32)
    # float32 sums of other shapes; what is seen in 8 bits begins at 8e-3.
    assert (whole - tiled).abs().max() < 2e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_square_looks_no_further_than_the_receptive_radius_and_nearly_so_far(name: str) -> None:
    stage = convolutional_stage(NETWORKS[name])
    radius = stage.config.geometry.receptive_radius
    assert radius is not None
    side = 4 * radius
    low, level = torch.zeros(1, 3, side // 4, side // 4), torch.zeros(1, 1, 1, 1)
    cond = Conditioning(torch.zeros(1, 1, 8), torch.ones(1, 1, dtype=torch.bool), low, level)
    denoise = stage.prepare(cond)
    z = torch.zeros(1, 3, side, side)
    with torch.inference_mode():
        before = denoise(z, level)
        z[..., side // 2, side // 2] = 100.0
        changed = (denoise(z, level) - before).abs().amax(dim=(0, 1)) > 0  # type: ignore[operator]
    step = stage.config.geometry.divisor
    reached = (changed.nonzero() // step - side // 2 // step).abs().max() * step  # in whole squares
    assert reached <= radius
    assert reached > radius - 3 * step


def test_with_too_little_around_them_tiles_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = convolutional_stage(NETWORKS["levels"])
    whole = drawn(stage, 64, 64, None)
    monkeypatch.setattr(UNetConfig, "_receptive_radius", lambda *_: 8)
    assert (whole - drawn(stage, 64, 64, 32)).abs().max() > 1e-3


def test_memory_in_tiles_grows_by_a_few_tensors_of_the_picture_alone() -> None:
    wide = UNetConfig(channels=(64,), blocks=(1,), strides=(1,), attention=(False,), patch=2, norm="pixel")
    stage = convolutional_stage(wide)

    def peak(side: int, tile: int | None) -> int:
        with LiveBytes() as live:
            drawn(stage, side, side, tile)
        return live.peak

    assert peak(128, 16) < peak(128, None) / 3
    grown = (peak(128, 16) - peak(96, 16)) / (128**2 - 96**2)
    # Two pictures of three float32 channels are 24 bytes a pixel; guidance doubles what enters the network.
    assert grown < 14 * 24


@pytest.mark.parametrize(
    ("model", "tile", "message"),
    [
        (UNetConfig(attention=(False, False, True), norm="pixel"), 64, "sees the whole picture at once"),
        (UNetConfig(attention=(False,) * 3, norm="group"), 64, "sees the whole picture at once"),
        (NETWORKS["levels"], 12, "tile: 12; stage sr64 expects a multiple of 8"),
        (NETWORKS["levels"], 4, "expects a multiple of 8"),
    ],
    ids=["attention", "group norm", "no multiple", "too small"],
)
def test_tiles_that_would_change_the_picture_are_refused(model: UNetConfig, tile: int, message: str) -> None:
    with pytest.raises(CascadeError, match=message):
        convolutional_stage(model).tiled(tile)


@pytest.mark.parametrize("model", [NETWORKS["levels"], IF_NETWORK], ids=["unet", "if_unet"])
def test_what_a_network_has_prepared_of_images_can_be_cropped_and_all_else_is_kept(model: ModelConfig) -> None:
    network = build_network(
        StageConfig(name="sr", resolution=16, low_resolution=8, model=model, schedule=SquaredCosineSchedule())
    )
    cond = Conditioning(torch.ones(1, 2, model.text_dim), torch.ones(1, 2, dtype=torch.bool))
    whole = network.prepare(replace(cond, low_res=torch.rand(1, 3, 16, 16), low_res_log_snr=torch.zeros(1, 1, 1, 1)))
    part = whole.crop(slice(0, 8), slice(8, 16))
    for field in fields(whole):  # type: ignore[arg-type]
        before, after = getattr(whole, field.name), getattr(part, field.name)
        assert torch.equal(after, before[:, :, :8, 8:]) if field.name == "low_res" else after is before


def test_a_stage_drawn_whole_is_the_stage_itself() -> None:
    stage = convolutional_stage(NETWORKS["levels"])
    assert stage.tiled(None) is stage
    assert stage.tiled(32).network is not stage.network
