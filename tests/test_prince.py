"""configs/prince/base.yaml is chapter 18 of Prince (2023): its runs and pictures equal the book's formulas in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_training import fill
from numpy.typing import NDArray
from reference import chapter18

from cascade.cli.program import main
from cascade.conditioning import Conditioning
from cascade.diffusion.loss import uniform_levels
from cascade.diffusion.noise import noise_like
from cascade.seeds import generator
from cascade.stage import Stage, build_stage
from cascade.storage.training import load_train_config, load_trainer
from cascade.training.step import TrainingBatch, draw_noise

BOOK = Path(__file__).parents[1] / "configs" / "prince" / "base.yaml"
T = 1000
BETAS = chapter18.linear_betas(T, 1e-4, 0.02)


def book_stage(*changes: str) -> Stage:
    """The stage of the file, none of whose weights is zero."""
    stage = build_stage(load_train_config(BOOK, changes).stage)
    fill(stage.network, scale=0.02)
    return stage


def conditions(count: int) -> Conditioning:
    text = torch.randn(count, 4, 192, generator=torch.Generator().manual_seed(1))
    return Conditioning(text, torch.ones(count, 4, dtype=torch.bool))


class Predictor:
    """g_t[z_t, phi_t], the file's network, for pictures in float64 NumPy at step t of 1 .. T."""

    def __init__(self, stage: Stage, cond: Conditioning, betas: NDArray[np.float64] = BETAS) -> None:
        self.stage, self.prepared, self.alphas = stage, stage.network.prepare(cond), chapter18.alphas(betas)

    def __call__(self, z: NDArray[np.float64], t: int) -> NDArray[np.float64]:
        alpha = self.alphas[t - 1]
        level = torch.full((len(z), 1, 1, 1), float(np.log(alpha) - np.log1p(-alpha)))
        with torch.inference_mode():
            output = self.stage.network(torch.from_numpy(z).float(), level, self.prepared)
        return output.double().numpy()


def test_a_view_of_a_run_has_the_loss_of_algorithm_18_1(tmp_path: Path) -> None:
    """Through the trainer that the file makes: noise mixed in by eq. 18.8, and the plain square of what is left."""
    run = load_trainer(load_train_config(BOOK, [f"output={tmp_path}", "training.batch_size=8"]))
    fill(run.stage.network, scale=0.02)
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    cond, samples = conditions(8), range(40, 48)
    batch = TrainingBatch(x, cond.text, cond.text_mask, samples, torch.arange(8), 8)
    with torch.no_grad():
        losses, levels = run.objective(run.stage, run.stage.network, batch)
    drawn = draw_noise(samples, (3, 16, 16), None, run.objective.source)
    steps = [int(np.floor(u * T)) + 1 for u in drawn.u.double().numpy()]
    alphas = chapter18.alphas(BETAS)
    expected = []
    for row, t in enumerate(steps):
        own = Conditioning(cond.text[row : row + 1], cond.text_mask[row : row + 1])
        picture, eps = (tensor[row : row + 1].double().numpy() for tensor in (x, drawn.eps))
        expected.append(chapter18.loss_18_1(Predictor(run.stage, own), picture, eps, t, alphas))
    assert len(set(steps)) == 8
    np.testing.assert_allclose(torch.sigmoid(levels.double()).flatten().numpy(), alphas[np.array(steps) - 1], rtol=1e-5)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)  # a float32 network on float32 pictures


def test_every_step_from_1_to_t_is_drawn_alike() -> None:
    """u in [0, 1) in a thousand equal parts, the last of which is step T."""
    config = load_train_config(BOOK)
    schedule = build_stage(config.stage).schedule
    assert (config.training.loss.levels.kind, config.training.loss.stratified) == ("uniform", False)
    u = (torch.arange(T) + 0.5) / T
    alphas = torch.sigmoid(uniform_levels(schedule, u).double()).flatten().numpy()
    np.testing.assert_allclose(alphas, chapter18.alphas(BETAS), rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [pytest.param(T, 1e-4, 0.02, marks=pytest.mark.slow), (20, 0.02, 0.4)]
)
def test_a_picture_is_that_of_algorithm_18_2(steps: int, first: float, last: float) -> None:
    """All T steps of ancestral sampling with variance beta, by the file's sampling settings and its own network."""
    schedule = (
        f"stage.schedule.steps={steps}",
        f"stage.schedule.beta_start={first}",
        f"stage.schedule.beta_end={last}",
    )
    stage, cond = book_stage(*schedule, f"stage.sampling.steps={steps}"), conditions(1)
    betas = chapter18.linear_betas(steps, first, last)
    start, noise_rng = noise_like(torch.empty(1, 3, 16, 16), [generator(5)]), [generator(6)]
    noise = [noise_like(start, noise_rng).double().numpy() for _ in range(steps - 1)]
    with torch.inference_mode():
        drawn = stage.sample(cond, cond, start, [generator(6)]).numpy()
    predict, z = Predictor(stage, cond, betas), start.double().numpy()
    expected = chapter18.sample_18_2(predict, z, betas, noise, large_variance=True)
    # A float32 chain of up to a thousand steps beside one in float64, whose network is float32 too.
    allowed = 5e-5 * np.abs(expected).max()
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=allowed)
    other = chapter18.sample_18_2(predict, z, betas, noise, large_variance=False)
    assert np.abs(other - expected).max() > allowed, "the posterior's variance would be seen"


def test_the_file_asks_for_all_steps_and_for_variance_beta() -> None:
    stage = book_stage()
    assert (stage.count_steps(), stage.schedule.steps) == (T, T)
    assert stage.config.sampling.sampler.own["variance"] == "beta"


def test_the_network_is_that_of_the_figure() -> None:
    """Figure 18.9: time is added, strided 3x3 convolutions lead down, 3x3 ones up, the encoder is concatenated."""
    network = build_stage(load_train_config(BOOK).stage, device="meta").network
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    assert shapes["levels.1.down.conv.weight"] == (64, 32, 3, 3)
    assert shapes["levels.1.up.conv.weight"] == (32, 64, 3, 3)
    assert shapes["levels.0.decode.0.residual.conv_in.weight"] == (32, 64, 3, 3)
    assert shapes["levels.0.encode.0.residual.embed.weight"] == (32, 64), "one number for each channel, which is added"


def test_the_book_trains_and_draws_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("training.steps=2", "training.optimizer={learning_rate: 1e-3, warmup_steps: 0}")
    short += ("stage.schedule.steps=20", "stage.sampling.steps=20")
    assert main(["train", str(BOOK), f"output={tmp_path / 'run'}", *short]) == 0
    parts = ["--text-encoder", "bundled", "--stage", str(tmp_path / "run"), "--out", str(tmp_path / "book")]
    assert main(["assemble", *parts, "--name", "book", "--license", "CC0-1.0"]) == 0
    call = ["generate", "a red circle", "--model", str(tmp_path / "book"), "--out", str(tmp_path / "out")]
    assert main(call) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
