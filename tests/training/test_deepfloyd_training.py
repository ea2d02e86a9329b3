"""Fine-tuning DeepFloyd IF: true inputs, a loss that keeps the predicted variance usable, and a model for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_if import TEXT_DIM, make_if, own_picture, peer_picture
from helpers_training import log_entries

from cascade.conditioning import Conditioning
from cascade.config.training import TrainConfig
from cascade.diffusion.loss import Weighting, log_likelihood, variational_bits
from cascade.diffusion.noise import diffuse, posterior, to_x
from cascade.models.if_unet import IF_NOISE
from cascade.pictures.images import downsample, upsample_corners
from cascade.settings import parse
from cascade.stage import Stage, build_stage
from cascade.storage.convert import convert
from cascade.storage.diffusers import read_stage
from cascade.storage.stage import load_stage
from cascade.storage.training import load_trainer
from cascade.training.step import NoiseSource, TrainingBatch, conditions, draw_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("if")
    for enlarges in (False, True):
        make_if(root / f"if-{enlarges}", enlarges)
    return {enlarges: root / f"if-{enlarges}" for enlarges in (False, True)}


def run_of(folder: Path, output: Path, **training: Any) -> TrainConfig:
    """A run that starts from a folder of diffusers."""
    settings = {
        "output": str(output),
        "stage": read_stage(folder).model_dump(mode="json"),
        "text": {"encoder": str(folder / "text_encoder"), "max_length": 77, "padded": True, "captions": "deepfloyd"},
        "data": {"sources": [{"kind": "scenes"}], "max_aug_level": 0.9},
        "training": {"init_from": str(folder), "log_every": 1, **training},
    }
    return parse(TrainConfig, settings, "run")


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(*steps: int) -> torch.Tensor:
    return IF_NOISE.log_snr(torch.tensor([step + 1 for step in steps]).double() / 1000)[:, None, None, None]


def test_the_bound_is_the_divergence_of_two_gaussians() -> None:
    log_snr, x = levels(1, 400, 999), draws(3, 3, 4, 4).clamp(-1, 1)
    z, x_hat, place = diffuse(x, draws(3, 3, 4, 4, seed=1), log_snr), 0.9 * x, torch.rand(3, 3, 4, 4)
    step = IF_NOISE.reverse_step(log_snr)
    true_mean, variance = posterior(x, z, log_snr, step.before)
    mean, _ = posterior(x_hat, z, log_snr, step.before)
    betas = IF_NOISE.betas[[1, 400, 999]].float()[:, None, None, None]
    std = (variance ** (1 - place) * betas**place).sqrt()
    normal = torch.distributions.Normal
    bits = torch.distributions.kl_divergence(normal(true_mean, variance.sqrt()), normal(mean, std)) / torch.log(
        torch.tensor(2.0)
    )
    ours = variational_bits(place, x_hat, x, z, log_snr, step)
    torch.testing.assert_close(ours, bits.mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_the_first_step_is_measured_by_the_likelihood_of_256_levels() -> None:
    values = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    log_p = log_likelihood(values, torch.full_like(values, 0.3), torch.tensor(-4.0))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    log_snr, x = levels(0), draws(1, 3, 4, 4).clamp(-1, 1)
    z = diffuse(x, draws(1, 3, 4, 4, seed=1), log_snr)
    bits = variational_bits(torch.zeros_like(x), x, x, z, log_snr, IF_NOISE.reverse_step(log_snr))
    assert 0 < bits.item() < 1.5  # a Gaussian of about the width of a bin, in the right place


@pytest.mark.parametrize("enlarges", [False, True])
def test_the_bound_trains_the_variance_and_only_the_variance(folders: dict[bool, Path], enlarges: bool) -> None:
    stage = build_stage(read_stage(folders[enlarges]))
    size = stage.config.resolution
    x, text = draws(2, 3, size, size).clamp(-1, 1), draws(2, 77, TEXT_DIM, seed=2)
    cond = Conditioning(text, torch.ones(2, 77, dtype=torch.bool))
    if enlarges:
        cond = Conditioning(cond.text, cond.text_mask, draws(2, 3, size, size, seed=3), levels(250, 250))
    last = stage.network.conv_out.weight
    gradients = []
    for weight in (0.0, 1.0):
        loss = stage.loss(stage.network, Weighting(variance=weight), x, cond, levels(300, 900), draws(2, 3, size, size))
        gradients.append(torch.autograd.grad(loss.mean(), last)[0])
    without, with_bound = gradients
    assert not without[3:].any()
    assert with_bound[3:].any()
    torch.testing.assert_close(without[:3], with_bound[:3])


def test_the_second_stage_sees_the_reduced_enlarged_and_independently_noised_picture(folders: dict[bool, Path]) -> None:
    stage = build_stage(read_stage(folders[True]))
    x = draws(2, 3, 32, 32).clamp(-1, 1)
    batch = TrainingBatch(x, draws(2, 77, TEXT_DIM), torch.ones(2, 77, dtype=torch.bool), [5, 6], torch.arange(2), 2)
    draw = draw_noise([5, 6], (3, 32, 32), stage.noised_shape((3, 32, 32)), NoiseSource(0, 0.9))
    cond = conditions(stage, batch, draw)
    assert draw.aug_eps is not None
    assert draw.aug_eps.shape == draw.eps.shape
    assert not torch.equal(draw.aug_eps, draw.eps)
    std = draw.aug_level[:, None, None, None]
    expected = (1 - std**2).sqrt() * upsample_corners(downsample(x, 8), (32, 32)) + std * draw.aug_eps
    torch.testing.assert_close(cond.low_res, expected)
    torch.testing.assert_close(torch.sigmoid(-cond.low_res_log_snr).sqrt(), std)


def in_diffusers(stage: Path, source: Path, out: Path) -> Any:
    """diffusers' pipeline of a finished stage, with the text encoder that it was trained with."""
    from diffusers import DiffusionPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    convert(stage, out)
    pipeline = DiffusionPipeline.from_pretrained(
        out,
        text_encoder=T5EncoderModel.from_pretrained(source / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(source / "tokenizer"),
        safety_checker=None,
        watermarker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bits_of(stage: Stage, teller: Stage) -> float:
    """Mean bound at a few steps where `stage` predicts the picture, and `teller` where the variance lies."""
    size, steps = stage.config.resolution, levels(100, 400, 700, 900)
    x = draws(4, 3, size, size, seed=7).clamp(-1, 1)
    cond = Conditioning(draws(4, 77, TEXT_DIM, seed=8), torch.ones(4, 77, dtype=torch.bool))
    if stage.config.low_resolution:
        cond = Conditioning(cond.text, cond.text_mask, x, levels(250).expand(4, 1, 1, 1))
    z = diffuse(x, draws(4, 3, size, size, seed=9), steps)
    with torch.inference_mode():
        x_hat = to_x("eps", stage.network(z, steps, cond)[:, :3], z, steps)
        place = (teller.network(z, steps, cond)[:, 3:] + 1) / 2
        return variational_bits(place, x_hat, x, z, steps, IF_NOISE.reverse_step(steps)).mean().item()


@pytest.mark.filterwarnings("ignore:the prompt .* more than max_length")
@pytest.mark.parametrize("enlarges", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fine_tuning_lowers_the_loss_and_diffusers_draws_the_same_with_the_learned_variance(
    folders: dict[bool, Path], tmp_path: Path, enlarges: bool
) -> None:
    config = run_of(
        folders[enlarges],
        tmp_path / "run",
        steps=16,
        batch_size=4,
        loss={"stratified": True},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 0},
        ema={"half_life_images": 20},
    )
    assert load_trainer(config).run()
    losses = [entry["loss"] for entry in log_entries(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    before, after = load_stage(folders[enlarges]), load_stage(tmp_path / "run" / "stage")
    assert bits_of(after, teller=after) < bits_of(after, teller=before)
    theirs = in_diffusers(tmp_path / "run" / "stage", folders[enlarges], tmp_path / "theirs")
    assert theirs.scheduler.config.variance_type == "learned_range"
    low = draws(1, 3, 8, 8).clamp(-1, 1) if enlarges else None
    ours = own_picture(after, folders[enlarges] / "text_encoder", low)
    torch.testing.assert_close(ours, peer_picture(theirs, low), rtol=0, atol=5e-4)


@pytest.mark.filterwarnings("ignore:the prompt .* more than max_length")
@pytest.mark.parametrize("enlarges", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_low_rank_adaptation_changes_attention_alone_by_its_rank_resumes_and_reloads_in_diffusers(
    folders: dict[bool, Path], tmp_path: Path, enlarges: bool
) -> None:
    folder, finished = folders[enlarges], tmp_path / "run" / "stage"
    optimizer = {"learning_rate": 1e-2, "warmup_steps": 0}
    config = run_of(folder, tmp_path / "run", steps=6, batch_size=4, lora_rank=2, optimizer=optimizer)
    assert load_trainer(config).run()
    before, after = (load_stage(path).network.state_dict() for path in (folder, finished))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        assert "attentions" in name
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2

    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
    assert load_trainer(longer).run(resume=True)
    theirs = in_diffusers(finished, folder, tmp_path / "theirs").unet.state_dict()
    ours = load_stage(finished).network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
