"""The learning rate against its closed forms, and which weights decay."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import micro_config, trainer

from cascade.config.training import OptimizerConfig
from cascade.errors import CascadeError
from cascade.models.network import Network
from cascade.storage.stage import load_stage
from cascade.training.optim import averaged_weights, build_optimizer, learning_rate, set_learning_rate
from cascade.training.state import load_newest


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, config, steps) for step in range(steps)]


def test_warmup_rises_in_equal_steps_to_the_peak() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    assert rates(5, warmup_steps=0) == [1.0] * 5


def test_linear_decay_ends_one_step_short_of_zero() -> None:
    assert rates(8, warmup_steps=0, decay="linear", decay_steps=4) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_cosine_decay_is_half_a_cosine() -> None:
    expected = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates(6, warmup_steps=0, decay="cosine", decay_steps=4) == pytest.approx([1, 1, *expected])


def test_decay_without_a_length_fills_the_run_after_the_warmup() -> None:
    after_warmup = [1 - k / 4 for k in range(4)]
    assert rates(6, warmup_steps=2, decay="linear") == pytest.approx([1 / 3, 2 / 3, *after_warmup])


def test_every_step_learns() -> None:
    for decay in ("constant", "linear", "cosine"):
        assert min(rates(50, warmup_steps=10, decay=decay, decay_steps=40)) > 0


def test_only_matrices_and_kernels_decay() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.LayerNorm(4))
    optimizer = build_optimizer(network, OptimizerConfig(weight_decay=0.5))
    decay_of = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay_of[p] for name, p in network.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_setting_the_learning_rate_reaches_every_group(kind: str) -> None:
    optimizer = build_optimizer(Repeated(), OptimizerConfig(kind=kind))
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_layout", [torch.contiguous_format, torch.channels_last])
def test_adamw_moves_a_kernel_alike_in_whatever_layout_it_and_its_gradient_lie(
    weight_layout: torch.memory_format, gradient_layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 4, 3, bias=False).to(memory_format=weight_layout)
    reference = torch.nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format))
    config = OptimizerConfig(kind="adamw", learning_rate=0.1, weight_decay=0.1)
    optimizer = build_optimizer(layer, config)
    plain = torch.optim.AdamW([reference], lr=0.1, betas=config.betas, weight_decay=0.1, fused=False)
    for _ in range(3):
        gradient = torch.randn(4, 6, 3, 3)
        layer.weight.grad, reference.grad = gradient.clone(memory_format=gradient_layout), gradient
        optimizer.step()
        plain.step()
    torch.testing.assert_close(layer.weight, reference)
    assert layer.weight.is_contiguous(memory_format=weight_layout)
    assert optimizer.state[layer.weight]["exp_avg"].stride() == layer.weight.stride()


def test_adamw_copies_no_channels_last_gradient() -> None:
    layer = torch.nn.Conv2d(6, 4, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(layer, OptimizerConfig(kind="adamw"))
    layer(torch.ones(1, 6, 5, 5)).sum().backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    calls = [event.name for event in profile.events()]
    assert "aten::_fused_adamw_" in calls
    assert not {"aten::clone", "aten::contiguous"} & set(calls)


class Repeated(Network):
    """A kernel that Muon moves, and one that it leaves to AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.levels = torch.nn.ModuleList([torch.nn.Conv2d(4, 6, 3)])

    def repeated_blocks(self) -> list[torch.nn.Module]:
        return list(self.levels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_a_flattened_kernel_as_torchs_moves_a_matrix(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = Repeated().to(memory_format=layout)
    config = OptimizerConfig(kind="muon", learning_rate=0.01, weight_decay=0.1)
    optimizer = build_optimizer(network, config)
    kernel, first = network.levels[0].weight, network.stem.weight
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    reference = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    other = torch.nn.Parameter(first.detach().clone())
    adamw = torch.optim.AdamW([other], lr=0.01, betas=config.betas, weight_decay=0.1)
    for step in range(3):
        for p in network.parameters():
            p.grad = (
                torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(memory_format=layout)
                if p.ndim == 4
                else torch.zeros_like(p)
            )
        matrix.grad, other.grad = kernel.grad.flatten(1).clone(), first.grad.clone()
        for each in (optimizer, reference, adamw):
            each.step()
    # The rows' order of summation differs with the layout, in bf16.
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=2e-3 * 0.01)
    torch.testing.assert_close(first, other)
    assert optimizer.state[kernel]["momentum_buffer"].shape == kernel.shape


def test_muon_steps_are_orthogonal_and_as_large_as_adamws() -> None:
    network = Repeated()
    before = network.levels[0].weight.detach().clone()
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon", learning_rate=1.0))
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    update = (network.levels[0].weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(update) / (0.2 * 36**0.5)  # 4 * 3 * 3 columns
    assert values.min() > 0.5
    assert values.max() < 1.5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adafactor_moves_a_flattened_kernel_as_torchs_moves_a_matrix(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 4, 3).to(memory_format=layout)
    optimizer = build_optimizer(layer, OptimizerConfig(kind="adafactor", learning_rate=0.1, weight_decay=0.1))
    matrix = torch.nn.Parameter(layer.weight.detach().flatten(1).clone())
    vector = torch.nn.Parameter(layer.bias.detach().clone())
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    reference = torch.optim.Adafactor(groups, lr=0.1)
    for step in range(1, 5):
        gradient = 10.0**-step * torch.randn(4, 6, 3, 3)
        layer.weight.grad, matrix.grad = gradient.to(memory_format=layout), gradient.flatten(1)
        layer.bias.grad = gradient.sum(dim=(1, 2, 3))
        vector.grad = layer.bias.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(layer.weight.flatten(1), matrix)
    torch.testing.assert_close(layer.bias, vector)
    state = optimizer.state[layer.weight]
    assert {name: tuple(value.shape) for name, value in state.items() if value.ndim} == {
        "rows": (4, 1, 1, 1),
        "columns": (1, 6, 3, 3),
    }


def test_adafactor_reads_no_number_from_the_device() -> None:
    """A tensor of the meta device has none: reading it raises."""
    layer = torch.nn.Conv2d(6, 4, 3, device="meta")
    optimizer = build_optimizer(layer, OptimizerConfig(kind="adafactor", weight_decay=0.1))
    for parameter in layer.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):  # torch's reads two for each weight
        torch.optim.Adafactor(layer.parameters()).step()


# --- the optimizers of the extra -----------------------------------------------------------------------------------

EXTRA = {"schedule_free": 0.05, "prodigy": 1.0}
"""Each with its learning rate."""


class Valley(torch.nn.Module):
    """A loss with a known minimum: a matrix at 3, a vector at -1, of unlike curvature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix, self.vector = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))

    def loss(self) -> torch.Tensor:
        return (self.matrix - 3).square().sum() + 20 * (self.vector + 1).square().sum()


@pytest.mark.parametrize("kind", EXTRA)
def test_the_optimizers_of_the_extra_find_the_minimum(kind: Any) -> None:
    valley = Valley()
    optimizer = build_optimizer(valley, OptimizerConfig(kind=kind, learning_rate=EXTRA[kind]))
    for _ in range(1200):
        valley.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = averaged_weights(optimizer, valley) or dict(valley.named_parameters())
    torch.testing.assert_close(found["matrix"].detach(), torch.full((3, 4), 3.0), rtol=0, atol=0.03)
    torch.testing.assert_close(found["vector"].detach(), torch.full((4,), -1.0), rtol=0, atol=0.03)


def test_what_schedule_free_draws_with_is_its_packages_average() -> None:
    valley = Valley()
    optimizer = build_optimizer(valley, OptimizerConfig(kind="schedule_free", learning_rate=0.05))
    for _ in range(7):
        valley.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = averaged_weights(optimizer, valley)
    assert ours is not None
    optimizer.eval()
    for name, parameter in valley.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=1e-6)
    assert averaged_weights(build_optimizer(valley, OptimizerConfig()), valley) is None


@pytest.mark.parametrize("kind", EXTRA)
def test_a_run_with_an_optimizer_of_the_extra_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    settings = f"kind: {kind}, learning_rate: {EXTRA[kind]}, weight_decay: 0.1, warmup_steps: 1"
    changes = (f"training.optimizer={{{settings}}}",)
    whole, halves = (micro_config(tmp_path / name, *changes) for name in ("whole", "halves"))
    assert trainer(whole).run()
    assert trainer(micro_config(tmp_path / "halves", *changes, "training.steps=2")).run()
    assert trainer(halves).run(resume=True)
    first, second = (load_newest(tmp_path / name, config) for name, config in (("whole", whole), ("halves", halves)))
    for part in ("network", "ema", "optimizer"):
        one, other = getattr(first, part), getattr(second, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert int(first.optimizer["::k"]) == whole.training.steps


def test_a_schedule_free_stage_is_the_optimizers_average(tmp_path: Path) -> None:
    changes = "training.optimizer={kind: schedule_free, learning_rate: 0.05, warmup_steps: 1}"
    run = trainer(micro_config(tmp_path / "run", changes))
    assert run.run()
    averages = averaged_weights(run.optimizer.optimizer, run.stage.network)
    assert averages is not None
    stage = load_stage(tmp_path / "run" / "stage").network.state_dict()
    assert all(torch.equal(stage[name], weight) for name, weight in averages.items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{kind: schedule_free, decay: cosine}", "averages in place of a decay; leave out optimizer.decay"),
        ("{kind: schedule_free, betas: [0, 0.99]}", "set the first of optimizer.betas above 0"),
        ("{kind: prodigy}", "with 0.0001 it would stand still: set optimizer.learning_rate=1"),
    ],
)
def test_a_rate_that_an_optimizer_does_not_want_is_one_line(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=message):
        micro_config(tmp_path / "run", f"training.optimizer={setting}")


@pytest.mark.parametrize(("kind", "package"), [("schedule_free", "schedulefree"), ("prodigy", "prodigyopt")])
def test_without_its_package_the_extra_is_named(kind: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CascadeError, match=rf"needs {package}: pip install 'cascade-diffusion\[optimizers\]'"):
        build_optimizer(Valley(), OptimizerConfig(kind=kind, learning_rate=1.0))
