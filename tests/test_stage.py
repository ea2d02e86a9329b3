"""A stage is network, schedule and parameterization, composed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers_diffusion import from_x
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config.sampling import SamplingConfig
from cascade.config.stage import StageConfig
from cascade.diffusion.denoisers import clip, guide
from cascade.diffusion.loss import Weighting
from cascade.diffusion.noise import alpha, diffuse, noise_like, to_x
from cascade.diffusion.samplers import OnStep, sample_ddim
from cascade.diffusion.schedules import log_snr_grid
from cascade.pictures.images import upsample, upsample_corners
from cascade.resources.memory import count_parameters
from cascade.settings import parse
from cascade.stage import Stage, build_stage

MODEL: dict[str, Any] = {
    "channels": (8, 16),
    "blocks": (1, 1),
    "strides": (1, 2),
    "attention": (False, True),
    "groups": 4,
    "head_dim": 8,
    "embedding_dim": 16,
    "text_dim": 12,
}
PLAIN = SamplingConfig(sampler="ddim", steps=4, threshold=None)


def stage(low_resolution: int | None = None, awake: bool = True, **settings: Any) -> Stage:
    config = StageConfig.model_validate(
        {"name": "s", "resolution": 16, "low_resolution": low_resolution, "model": MODEL, **settings}
    )
    built = build_stage(config)
    rng = torch.Generator().manual_seed(0)
    for parameter in built.network.parameters() if awake else ():
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) / max(parameter[0].numel(), 4) ** 0.5)
    built.network.eval().requires_grad_(False)
    return built


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(count: int = 2, seed: int = 1, low_res: int | None = None, level: float = 3.0) -> Conditioning:
    return Conditioning(
        normal(count, 3, 12, seed=seed),
        torch.ones(count, 3, dtype=torch.bool),
        normal(count, 3, low_res, low_res, seed=9).clamp(-1, 1) if low_res else None,
        torch.full((count, 1, 1, 1), level) if low_res else None,
    )


def null(cond: Conditioning) -> Conditioning:
    return cond.with_text(torch.zeros_like(cond.text[:, :1]), cond.text_mask[:, :1])


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def draw(
    ours: Stage,
    cond: Conditioning,
    settings: SamplingConfig,
    on_step: OnStep | None = None,
    rng: list[torch.Generator] | None = None,
    size: tuple[int, int] = (16, 16),
) -> Tensor:
    rng = rng or generators(len(cond))
    z = noise_like(torch.empty(len(cond), 3, *size), rng)
    return ours.sample(cond, null(cond), z, rng, settings, on_step)


@pytest.mark.parametrize("kind", ["eps", "v", "x", "velocity"])
def test_sampling_is_the_composition_of_its_parts(kind: str) -> None:
    ours, cond = stage(parameterization=kind), conditions()

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        return to_x(kind, ours.network(z, log_snr, cond), z, log_snr)  # type: ignore[arg-type]

    rng = generators()
    z = noise_like(torch.empty(2, 3, 16, 16), rng)
    by_hand = sample_ddim(clip(denoise), z, log_snr_grid(ours.schedule, 4), rng)
    drawn = draw(ours, cond, PLAIN.model_copy(update={"threshold": "clip"}))
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=0)


def test_guided_sampling_is_guide_around_the_stage() -> None:
    ours, cond = stage(), conditions()
    rng = generators()
    z = noise_like(torch.empty(2, 3, 16, 16), rng)
    by_hand = sample_ddim(clip(guide(ours, cond, null(cond), 3.0)), z, log_snr_grid(ours.schedule, 4), rng)
    settings = PLAIN.model_copy(update={"threshold": "clip", "guidance": 3.0})
    drawn = draw(ours, cond, settings)
    torch.testing.assert_close(drawn, by_hand, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpm++"])
@pytest.mark.parametrize("path", ["picture", "residual"])
def test_a_perfect_denoiser_draws_its_picture(sampler: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stage(8, path=path, residual_scale=0.25)
    cond = conditions(low_res=8)
    picture = normal(2, 3, 16, 16, seed=4).clamp(-1, 1)
    base = ours.origin(cond, (16, 16))
    r = (picture - base) / (0.25 if path == "residual" else 1.0)
    monkeypatch.setattr(Stage, "prepare", lambda _stage, _cond: lambda _z, _log_snr: r)
    settings = SamplingConfig(sampler=sampler, steps=4, threshold="clip")  # type: ignore[arg-type]
    drawn = draw(ours, cond, settings)
    # log SNR ends at 20: noise of 4.5e-5 times the largest of 1536 normal numbers
    torch.testing.assert_close(drawn, picture, rtol=0, atol=2e-4)


def test_residual_is_measured_from_the_upsampled_picture_with_its_signal_at_one() -> None:
    cond = conditions(low_res=8, level=2.0)
    assert cond.low_res is not None
    assert cond.low_res_log_snr is not None
    clean = cond.low_res
    noised = replace(cond, low_res=diffuse(clean, torch.zeros_like(clean), cond.low_res_log_snr))
    torch.testing.assert_close(stage(8, path="residual").origin(noised, (16, 16)), upsample(clean, (16, 16)))
    assert not stage(8).origin(noised, (16, 16)).any()


def test_a_stage_sees_the_smaller_picture_with_noise_of_the_given_deviation_under_the_same_text() -> None:
    text, low, eps = conditions(), normal(2, 3, 8, 8, seed=9).clamp(-1, 1), normal(2, 3, 8, 8, seed=10)
    std = torch.tensor([0.0, 0.6])
    seen = stage(8).see(text, low, std, eps)
    assert seen.text is text.text
    assert seen.text_mask is text.text_mask
    torch.testing.assert_close(seen.low_res, torch.stack([low[0], 0.8 * low[1] + 0.6 * eps[1]]), rtol=0, atol=2e-4)
    assert seen.low_res_log_snr is not None
    assert seen.low_res_log_snr.flatten().tolist() == pytest.approx([20.0, 2 * math.log(0.8 / 0.6)])


def test_the_noise_on_a_smaller_picture_has_its_size_and_that_of_the_large_one_where_it_is_enlarged_first() -> None:
    network = {"kind": "if_unet", "channels": [32], "blocks": [1], "attention": [False], "head_dim": 8}
    enlarges_first = replace(
        stage(8),
        config=parse(
            StageConfig,
            {"name": "s", "resolution": 16, "low_resolution": 8, "model": network}
            | {"schedule": {"kind": "squared_cosine"}},
            "here",
        ),
    )
    shapes = [each.noised_shape((3, 32, 16)) for each in (stage(), stage(8), enlarges_first)]
    assert shapes == [None, (3, 16, 8), (3, 32, 16)]
    low = normal(1, 3, 16, 8, seed=9)
    seen = enlarges_first.see(conditions(1), low, torch.zeros(1), torch.zeros(1, 3, 32, 16))
    torch.testing.assert_close(seen.low_res, upsample_corners(low, (32, 16)))


@pytest.mark.parametrize("path", ["picture", "residual"])
@pytest.mark.parametrize("kind", ["eps", "v", "x", "velocity"])
def test_loss_of_a_perfect_network_is_zero(path: str, kind: str) -> None:
    ours = stage(8, path=path, residual_scale=0.25, parameterization=kind)
    cond, x, eps = conditions(low_res=8), normal(2, 3, 16, 16, seed=4).clamp(-1, 1), normal(2, 3, 16, 16, seed=5)
    log_snr = torch.tensor([-2.0, 3.0])[:, None, None, None]
    r = (x - ours.origin(cond, (16, 16))) / (0.25 if path == "residual" else 1.0)

    def perfect(z: Tensor, level: Tensor, seen: Conditioning) -> Tensor:
        assert seen.low_res is not None
        assert seen.low_res.shape == z.shape
        return from_x(kind, r, z, level)  # type: ignore[arg-type]

    loss = ours.loss(perfect, Weighting("x"), x, cond, log_snr, eps)
    assert loss.shape == (2,)
    # float32 rounding of z over the least noise, 0.2, squared
    assert loss.max().item() < 1e-9


def test_loss_is_that_of_the_residual_written_out() -> None:
    ours = stage(8, path="residual", residual_scale=0.25, parameterization="v")
    cond, x, eps = conditions(low_res=8), normal(2, 3, 16, 16, seed=4).clamp(-1, 1), normal(2, 3, 16, 16, seed=5)
    log_snr = torch.tensor([-2.0, 3.0])[:, None, None, None]
    assert cond.low_res is not None
    assert cond.low_res_log_snr is not None
    seen = replace(cond, low_res=upsample(cond.low_res, (16, 16)))
    r = (x - upsample(cond.low_res, (16, 16)) / alpha(cond.low_res_log_snr).sqrt()) / 0.25
    signal, noise = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    output = ours.network(signal * r + noise * eps, log_snr, seen)
    expected = (output - (signal * eps - noise * r)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours.loss(ours.network, Weighting("v"), x, cond, log_snr, eps), expected)


@pytest.mark.parametrize("low_resolution", [None, 8])
def test_a_picture_does_not_depend_on_its_batch(low_resolution: int | None) -> None:
    ours, cond = stage(low_resolution), conditions(3, low_res=low_resolution)
    settings = PLAIN.model_copy(update={"guidance": 2.0, "threshold": "clip"})
    together = draw(ours, cond, settings)
    only = [
        None if part is None else part[1:2] for part in (cond.text, cond.text_mask, cond.low_res, cond.low_res_log_snr)
    ]
    one = Conditioning(*only)  # type: ignore[arg-type]
    alone = draw(ours, one, settings, rng=generators(3)[1:2])
    # Matrix products group their sums by the batch; guidance doubles what they differ by, four steps hand it on.
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=2e-4)


def test_a_bfloat16_network_draws_float32_pictures_near_the_float32_ones() -> None:
    ours, cond = stage(8, parameterization="v"), conditions(low_res=8)
    settings = PLAIN.model_copy(update={"threshold": "clip"})
    full = draw(ours, cond, settings)
    half = draw(ours.to(dtype=torch.bfloat16), cond, settings)
    assert ours.network.stem.weight.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % a rounding, tens of layers
    assert (half - full).abs().mean() < 0.05


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_stage_draws_other_shapes_than_its_resolution(size: tuple[int, int]) -> None:
    cond = conditions()
    assert draw(stage(), cond, PLAIN, size=size).shape == (2, 3, *size)


def test_the_watcher_sees_pictures_not_residuals() -> None:
    ours, cond, seen = stage(8, awake=False, path="residual", parameterization="x"), conditions(low_res=8), []
    draw(ours, cond, PLAIN, lambda step, x_hat: seen.append((step, x_hat)))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    # A fresh network predicts a residual of zero: the upsampled picture itself.
    assert all(torch.equal(x_hat, ours.origin(cond, (16, 16))) for _, x_hat in seen)


def test_clip_acts_on_the_picture_of_a_residual_stage() -> None:
    ours, cond = stage(8, path="residual", residual_scale=0.5), conditions(low_res=8)
    seen: list[Tensor] = []
    settings = PLAIN.model_copy(update={"threshold": "clip"})
    draw(ours, cond, settings, lambda _, x_hat: seen.append(x_hat))
    # (base + 0.5 r) is taken apart and put together again in float32
    assert max(x_hat.abs().max().item() for x_hat in seen) <= 1 + 1e-5


def test_same_seed_same_fresh_weights_and_torchs_own_generator_is_left_alone() -> None:
    config = StageConfig.model_validate({"name": "s", "resolution": 16, "model": MODEL})
    before = torch.get_rng_state()
    one, same, other = (build_stage(config, seed=seed).network.stem.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stage_on_the_meta_device_holds_no_weights_but_counts_them() -> None:
    config = StageConfig.model_validate({"name": "s", "resolution": 16, "model": MODEL})
    meta = build_stage(config, device="meta")
    assert all(parameter.is_meta for parameter in meta.network.parameters())
    assert count_parameters(meta.network) == count_parameters(build_stage(config).network)


@pytest.mark.parametrize("kind", ["constant", "linear", "squared_cosine", "cosine"])
def test_every_schedule_builds_and_draws(kind: str) -> None:
    ours, cond = stage(awake=False, schedule={"kind": kind}, parameterization="v"), conditions()
    drawn = draw(ours, cond, PLAIN)
    assert bool(torch.isfinite(drawn).all())
