"""Distillation: on Gaussian data, where the flow is known, a student's few steps end where the flow does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import SUPER_RESOLUTION, WordEncoder, fill, log_entries, micro_config, trainer
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config.stage import save_stage
from cascade.config.training import DistillConfig, LossConfig, TrainConfig
from cascade.diffusion.noise import alpha, diffuse, one_minus_alpha, predicted_eps
from cascade.errors import CascadeError
from cascade.models.network import Network
from cascade.stage import Stage, build_stage
from cascade.training.distill import Distillation, TeacherPath, teacher_share
from cascade.training.step import NoiseSource, TrainingBatch

SPREAD = 0.5
"""Standard deviation of the data."""


def few(steps: int, *more: str) -> tuple[str, ...]:
    return (f"stage.sampling={{sampler: ddim, steps: {steps}, guidance: 1.0, threshold: null}}", *more)


def move(x: Tensor, z: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """DDIM from one level to another with eta 0."""
    return diffuse(x, predicted_eps(x, z, before), after)


def at(*levels: float) -> list[Tensor]:
    return [torch.tensor(level, dtype=torch.float64).view(1, 1, 1, 1) for level in levels]


@pytest.mark.parametrize(("before", "after", "end"), [(-8.0, -7.5, 3.0), (-1.0, 2.0, 2.5), (0.0, 6.0, math.inf)])
def test_one_step_with_the_mean_of_two_estimates_ends_where_their_two_steps_do(
    before: float, after: float, end: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    first, second, z = (torch.randn(1, 3, 4, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    t, s, e = at(before, after, end)
    there = move(second, move(first, z, t, s), s, e)
    share = teacher_share(t, s, e)
    assert 0 <= share.item() < 1
    torch.testing.assert_close(move(torch.lerp(second, first, share), z, t, e), there)
    assert teacher_share(t, s, s).item() == 1


class Exact(Network):
    """x_hat of Gaussian data, known in closed form; the weight only gives it a device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def prepare(self, cond: Conditioning) -> Any:
        return cond

    def repeated_blocks(self) -> list[nn.Module]:
        return []

    def attention_layers(self) -> list[nn.Module]:
        return []

    def forward(self, z: Tensor, log_snr: Tensor, _cond: object) -> Tensor:
        signal, noise = alpha(log_snr), one_minus_alpha(log_snr)
        return signal.sqrt() * SPREAD**2 / (signal * SPREAD**2 + noise) * z


def spread_at(level: Tensor) -> Tensor:
    """Standard deviation of z, which the flow keeps in proportion."""
    return (alpha(level) * SPREAD**2 + one_minus_alpha(level)).sqrt()


def whole_way(z: Tensor, before: Tensor, end: Tensor) -> Tensor:
    """The x that leads in one DDIM step from z to where the flow from z is at `end`."""
    there = z * spread_at(end) / spread_at(before)
    ratio = (one_minus_alpha(end) / one_minus_alpha(before)).sqrt()
    return (there - ratio * z) / (alpha(end).sqrt() - ratio * alpha(before).sqrt())


class Solved(Exact):
    """A student that has learned its task."""

    def __init__(self, path: TeacherPath) -> None:
        super().__init__()
        self.path = path

    def forward(self, z: Tensor, log_snr: Tensor, _cond: object) -> Tensor:
        ends = self.path.levels[self.path.stride :: self.path.stride].contiguous()
        place = torch.searchsorted(ends, log_snr.flatten(), right=True).clamp(max=len(ends) - 1)
        return whole_way(z.double(), log_snr.double(), ends[place].view(-1, 1, 1, 1).double()).float()


def gaussian_batch(count: int) -> TrainingBatch:
    rng = torch.Generator().manual_seed(0)
    return TrainingBatch(
        x=SPREAD * torch.randn(count, 3, 8, 8, generator=rng),
        text=torch.zeros(count, 1, 16),
        text_mask=torch.ones(count, 1, dtype=torch.bool),
        samples=range(count),
        positions=torch.arange(count),
        batch_size=count,
    )


def exact_pair(steps: int, teacher_steps: int) -> tuple[Stage, Distillation]:
    config = micro_config(Path("unused"), *few(steps, "stage.parameterization=x"))
    plain = build_stage(config.stage)
    teacher = replace(plain, network=Exact())
    loss = LossConfig(space="x", stratified=True)
    settings = DistillConfig(teacher="unused", teacher_steps=teacher_steps)
    rule = Distillation.of(plain, teacher, settings, loss, NoiseSource(0, 0.0), WordEncoder())
    return replace(plain, network=Solved(rule.path)), rule


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_that_follows_the_flow_is_told_to_stay_and_more_so_the_finer_the_path(steps: int) -> None:
    errors = []
    for teacher_steps in (64, 256):
        student, rule = exact_pair(steps, teacher_steps)
        loss, _ = rule(student, student.network, gaussian_batch(256))
        errors.append(loss.mean().sqrt().item())
    assert errors[1] < 0.002
    assert errors[1] < errors[0] / 3  # first order: a quarter


class Table(Exact):
    """A student with one number for each noise level of the path."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.levels = levels[:-1]
        self.factors = nn.Parameter(torch.zeros(len(self.levels)))

    def forward(self, z: Tensor, log_snr: Tensor, _cond: object) -> Tensor:
        place = (log_snr.flatten()[:, None] - self.levels).abs().argmin(1)
        return self.factors[place].view(-1, 1, 1, 1) * z


def test_a_one_step_student_learns_the_end_of_the_flow() -> None:
    student, rule = exact_pair(1, 16)
    student = replace(student, network=Table(rule.path.levels))
    optimizer = torch.optim.Adam(student.network.parameters(), 0.05)
    batch = gaussian_batch(128)
    for step in range(1000):
        loss, _ = rule(student, student.network, replace(batch, samples=range(128 * step, 128 * step + 128)))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.995 if step > 500 else 1
    z = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(torch.zeros(4, 1, 16), torch.ones(4, 1, dtype=torch.bool))
    with torch.no_grad():
        drawn = student.sample(cond, cond, z, [torch.Generator()] * 4)
    assert (drawn / z).std() < 1e-5
    # The teacher's own 16 steps end within 10 % of the flow, and the student where they do.
    assert (drawn / z).mean().item() == pytest.approx(SPREAD, rel=0.1)
    teacher = replace(rule.teacher, config=micro_config(Path("unused"), *few(16, "stage.parameterization=x")).stage)
    with torch.no_grad():
        taught = teacher.sample(cond, cond, z, [torch.Generator()] * 4)
    assert (drawn / z).mean().item() == pytest.approx((taught / z).mean().item(), rel=0.005)


def test_guidance_is_learned_where_the_teacher_has_it_and_nowhere_else() -> None:
    sampling = "{guidance: 3.0, guidance_interval: [-2.0, 2.0], threshold: null}"
    config = micro_config(Path("unused"), f"stage.sampling={sampling}", "stage.parameterization=x")
    teacher = build_stage(config.stage)
    fill(teacher.network, scale=0.3)
    teacher.network.requires_grad_(False)
    student = build_stage(micro_config(Path("unused"), *few(2, "stage.parameterization=x")).stage)
    text = WordEncoder()
    settings = DistillConfig(teacher="unused", teacher_steps=4)
    rule = Distillation.of(student, teacher, settings, LossConfig(), NoiseSource(0, 0.0), text)
    levels = torch.tensor([-5.0, 0.0, 5.0]).view(3, 1, 1, 1)
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    words, null = text.encode(["a red star"] * 3), text.encode([""] * 3)
    cond = Conditioning(words.tokens, words.mask)
    found = rule.target(student, student.network, z, cond, (levels, levels + 1, levels + 1))
    own = teacher.prepare(cond)(z, levels)
    other = teacher.prepare(Conditioning(null.tokens, null.mask))(z, levels)
    assert isinstance(own, Tensor)
    assert isinstance(other, Tensor)
    guided = other + 3 * (own - other)
    assert not torch.allclose(guided[1], own[1], atol=1e-3)
    torch.testing.assert_close(found, torch.stack([own[0], guided[1], own[2]]), rtol=1e-4, atol=1e-5)


def taught(output: Path, teacher: Path, *more: str) -> TrainConfig:
    distill = f"training.distill={{teacher: {teacher}, teacher_steps: 8}}"
    return micro_config(output, *more, *few(2), distill)


def trained_teacher(folder: Path, *changes: str) -> Path:
    stage = build_stage(micro_config(folder, "stage.sampling.guidance=2.0", *changes).stage, seed=3)
    fill(stage.network, seed=3)
    save_stage(folder / "stage", stage.config, stage.network.state_dict())
    return folder / "stage"


@pytest.mark.parametrize("changes", [(), SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_a_distilled_run_starts_from_its_teacher_and_resumes_bit_for_bit(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    teacher = trained_teacher(tmp_path / "teacher", *changes)
    validation = "training.validation={sources: [{kind: scenes, held_out: true}], every: 2, batches: 1}"
    whole = trainer(taught(tmp_path / "whole", teacher, *changes, validation))
    start = {name: weight.clone() for name, weight in whole.stage.network.state_dict().items()}
    stored = build_stage(micro_config(tmp_path, *changes).stage, seed=3)
    fill(stored.network, seed=3)
    assert all(torch.equal(start[name], weight) for name, weight in stored.network.state_dict().items())
    assert whole.run()
    parted = taught(tmp_path / "parted", teacher, *changes, validation)
    first = trainer(parted.model_copy(update={"training": parted.training.model_copy(update={"save_every": 2})}))
    assert first.run()
    for step in (3, 4):
        for path in (tmp_path / "parted" / "checkpoints").glob(f"step-*{step}"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    second = trainer(parted)
    assert second.run(resume=True)
    ends = [run.stage.network.state_dict() for run in (whole, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert log_entries(tmp_path / "whole")[-1] == log_entries(tmp_path / "parted")[-1]


def test_a_teacher_of_another_size_is_refused(tmp_path: Path) -> None:
    teacher = trained_teacher(tmp_path / "teacher", "stage.resolution=16")
    with pytest.raises(CascadeError, match=r"has resolution 16, but stage\.resolution is 8; they must be equal"):
        trainer(taught(tmp_path / "run", teacher))


def test_a_teacher_whose_guidance_cannot_be_taught_is_refused(tmp_path: Path) -> None:
    teacher = trained_teacher(tmp_path / "teacher", "stage.sampling.projection={parallel: 0.0}")
    with pytest.raises(CascadeError, match=r"is drawn with sampling\.projection, which needs one noise level"):
        trainer(taught(tmp_path / "run", teacher))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.sampling.guidance=3.0", r"stage\.sampling\.guidance: a distilled stage is drawn with"),
        ("stage.sampling.eta=0.5", r"stage\.sampling\.sampler: a distilled stage is drawn with"),
        ("stage.sampling.sampler=ddpm", r"stage\.sampling\.sampler: a distilled stage is drawn with"),
        ("training.distill.teacher_steps=7", r"teacher_steps 7 is not a multiple of stage\.sampling\.steps 2"),
    ],
)
def test_settings_that_do_not_draw_what_is_taught_are_refused(tmp_path: Path, change: str, message: str) -> None:
    distill = "training.distill={teacher: anywhere, teacher_steps: 8}"
    with pytest.raises(CascadeError, match=message):
        micro_config(tmp_path, *few(2), distill, change)
