"""One step: noise depends on the view, loss on the picture, and algorithm 18.1 is one setting."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers_training import SUPER_RESOLUTION, TEXT_DIM, fill, micro_config
from reference import chapter18

from cascade.config.training import LossConfig, TrainConfig
from cascade.diffusion.noise import log_snr_from_std
from cascade.stage import Stage, build_stage
from cascade.training.step import Draw, NoiseSource, TrainingBatch, conditions, draw_noise, noise_levels, training_loss


def stage_of(config: TrainConfig) -> Stage:
    stage = build_stage(config.stage)
    fill(stage.network)
    return stage


def batch_of(samples: list[int], batch_size: int) -> TrainingBatch:
    """Pictures and texts that follow from the number of the view."""
    rngs = [torch.Generator().manual_seed(sample) for sample in samples]
    return TrainingBatch(
        x=torch.stack([torch.rand(3, 8, 8, generator=rng) * 2 - 1 for rng in rngs]),
        text=torch.stack([torch.randn(5, TEXT_DIM, generator=rng) for rng in rngs]),
        text_mask=torch.ones(len(samples), 5, dtype=torch.bool),
        samples=samples,
        positions=torch.tensor([sample % batch_size for sample in samples]),
        batch_size=batch_size,
    )


def test_noise_is_keyed_by_seed_and_view() -> None:
    both, alone = (draw_noise(samples, (3, 8, 8), (3, 4, 4), NoiseSource(0, 0.3)) for samples in ([3, 7], [7]))
    other_seed = draw_noise([7], (3, 8, 8), (3, 4, 4), NoiseSource(1, 0.3))
    for name in ("u", "eps", "aug_level", "aug_eps"):
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name))
        assert not torch.equal(getattr(both, name)[:1], getattr(alone, name))
        assert not torch.equal(getattr(other_seed, name), getattr(alone, name))


def test_the_augmentation_level_is_uniform_up_to_its_maximum() -> None:
    levels = draw_noise(range(2000), (3, 2, 2), (3, 1, 1), NoiseSource(0, 0.3)).aug_level
    assert levels.min() >= 0
    assert levels.max() < 0.3
    assert levels.mean().item() == pytest.approx(0.15, abs=4 * 0.3 / (12 * 2000) ** 0.5)  # 4 standard errors


def test_the_augmentation_level_may_be_uniform_in_the_time_of_the_cosine_schedule() -> None:
    levels = draw_noise(range(2000), (3, 2, 2), (3, 1, 1), NoiseSource(0, 0.9999, "time")).aug_level
    times = torch.atan(torch.exp(-log_snr_from_std(levels) / 2)) * 2 / torch.pi  # the cosine schedule, inverted
    for t in (0.1, 0.5, 0.9):
        share, tolerance = (times < t).double().mean().item(), 4 * (t * (1 - t) / 2000) ** 0.5  # 4 standard errors
        assert share == pytest.approx(t, abs=tolerance + 0.01)  # t ends at 0.99
    assert draw_noise(range(2000), (3, 2, 2), (3, 1, 1), NoiseSource(0, 0.3, "time")).aug_level.max() < 0.3


@pytest.mark.parametrize("changes", [(), SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_the_loss_of_a_picture_does_not_depend_on_its_batch(changes: tuple[str, ...]) -> None:
    config = micro_config("unused", *changes, "training.loss.stratified=true")
    stage, loss = stage_of(config), config.training.loss

    def losses(samples: list[int]) -> torch.Tensor:
        draw = draw_noise(samples, (3, 8, 8), stage.noised_shape((3, 8, 8)), NoiseSource(0, 0.3))
        values, _ = training_loss(stage, stage.network, batch_of(samples, 4), loss, draw)
        return values.detach()

    # Float32: matrix products of another batch size may round differently.
    torch.testing.assert_close(losses([4, 5, 6, 7])[2:3], losses([6]), rtol=1e-5, atol=1e-6)


def test_stratified_levels_put_one_picture_in_each_part_of_the_distribution() -> None:
    stage = stage_of(micro_config("unused"))
    batch, draw = batch_of([4, 5, 6, 7], 4), draw_noise([4, 5, 6, 7], (3, 8, 8), None, NoiseSource(0, 0.0))
    _, log_snr = training_loss(stage, stage.network, batch, LossConfig(stratified=True), draw)
    t = 2 / torch.pi * torch.atan(torch.exp(-log_snr.flatten() / 2))  # the cosine schedule, inverted
    assert (4 * t).floor().tolist() == [0, 1, 2, 3]


def documented_settings() -> tuple[str, ...]:
    """The assignments of the block that docs/mathematics.md gives for algorithm 18.1."""
    text = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text()
    settings = yaml.safe_load(text.split("## Training")[1].split("```yaml\n")[1].split("```")[0])
    return tuple(
        f"{part}.{name}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for part, values in settings.items()
        for name, value in values.items()
    )


def test_the_documented_settings_give_the_loss_of_algorithm_18_1_as_a_mean() -> None:
    config = micro_config("unused", *documented_settings())
    stage, batch = stage_of(config), batch_of([1, 2, 3], 3)
    draw = draw_noise([1, 2, 3], (3, 8, 8), None, NoiseSource(0, 0.0))
    settings = config.training.loss

    def network(z: torch.Tensor, _log_snr: torch.Tensor, _cond: object) -> torch.Tensor:
        return torch.tanh(2 * z) + 0.3

    losses, _ = training_loss(stage, network, batch, settings, draw)
    alphas = chapter18.alphas(chapter18.linear_betas(1000, 1e-4, 0.02))
    steps = (draw.u.double() * 1000).floor().long() + 1  # uniform over 1 .. T
    expected = [
        chapter18.loss_18_1(lambda z, _: np.tanh(2 * z) + 0.3, x.double().numpy(), eps.double().numpy(), t, alphas)
        for x, eps, t in zip(batch.x, draw.eps, steps.tolist(), strict=True)
    ]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)  # float32 in z and in the square


def test_logit_normal_levels_have_their_mean_and_deviation() -> None:
    config = micro_config("unused", "training.loss.levels={kind: logit_normal, mean: 0.5, std: 2.0}")
    u = (torch.arange(1000) + 0.5) / 1000
    logit = -noise_levels(stage_of(config), config.training.loss, u) / 2
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert logit.std().item() == pytest.approx(2.0, abs=0.01)


def test_a_super_resolution_stage_sees_the_noised_area_mean() -> None:
    stage = stage_of(micro_config("unused", *SUPER_RESOLUTION))
    batch, draw = batch_of([0, 1, 2], 3), draw_noise([0, 1, 2], (3, 8, 8), (3, 4, 4), NoiseSource(0, 0.3))
    cond = conditions(stage, batch, draw)
    mean = batch.x.reshape(3, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    level = draw.aug_level[:, None, None, None]
    torch.testing.assert_close(cond.low_res, (1 - level**2).sqrt() * mean + level * draw.aug_eps)
    torch.testing.assert_close(cond.low_res_log_snr, torch.log((1 - level**2) / level**2))


def test_a_view_with_a_smaller_picture_of_its_own_is_trained_on_that_one() -> None:
    stage = stage_of(micro_config("unused", *SUPER_RESOLUTION))
    draw = draw_noise([0, 1, 2], (3, 8, 8), (3, 4, 4), NoiseSource(0, 0.3))
    plain = batch_of([0, 1, 2], 3)
    own = torch.full((3, 4, 4), 0.5)
    seen, without = (conditions(stage, batch, draw) for batch in (replace(plain, lows={1: own}), plain))
    level = draw.aug_level[1]
    torch.testing.assert_close(seen.low_res[1], (1 - level**2).sqrt() * own + level * draw.aug_eps[1])
    assert torch.equal(seen.low_res[::2], without.low_res[::2])


def test_a_base_stage_sees_only_the_text() -> None:
    batch = batch_of([0, 1], 2)
    cond = conditions(stage_of(micro_config("unused")), batch, draw_noise([0, 1], (3, 8, 8), None, NoiseSource(0, 0.3)))
    assert cond.low_res is None
    assert cond.low_res_log_snr is None
    assert torch.equal(cond.text, batch.text)


def test_algorithm_18_1_is_a_setting() -> None:
    """Uniform t in 1..T, eps as target, the plain square: written by hand, in float64 but for the network."""
    config = micro_config("unused", "stage.schedule={kind: linear, steps: 50}")
    stage, batch, draw = (
        stage_of(config),
        batch_of([0, 1, 2, 3], 4),
        draw_noise([0, 1, 2, 3], (3, 8, 8), None, NoiseSource(0, 0.0)),
    )
    losses, log_snr = training_loss(stage, stage.network, batch, config.training.loss, draw)

    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), dim=0)
    for index in range(4):
        t = int(draw.u[index].double() * 50) + 1
        alpha_t = alphas[t - 1]
        z = alpha_t.sqrt() * batch.x[index] + (1 - alpha_t).sqrt() * draw.eps[index]
        one = replace(
            batch, x=batch.x[index : index + 1], text=batch.text[index : index + 1], text_mask=batch.text_mask[:1]
        )
        level = torch.log(alpha_t / (1 - alpha_t)).float().reshape(1, 1, 1, 1)
        assert log_snr[index].item() == pytest.approx(level.item(), rel=1e-5)
        cond = conditions(stage, one, Draw(draw.u[:1], draw.eps[:1], draw.aug_level[:1], None))
        eps_hat = stage.network(z.float()[None], level, cond)[0]
        expected = (eps_hat.double() - draw.eps[index].double()).square().mean()
        assert losses[index].item() == pytest.approx(expected.item(), rel=1e-4)  # float32 through the network


def test_the_default_loss_is_that_of_algorithm_18_1() -> None:
    loss = LossConfig()
    assert (loss.space, loss.min_snr_gamma, loss.max_weight, loss.stratified) == ("eps", None, None, False)
    assert loss.levels.kind == "uniform"
