"""The learning rate against its closed forms, and which weights decay."""

import math

import pytest
import torch

from cascade.config import OptimizerConfig
from cascade.training.optim import build_optimizer, learning_rate, set_learning_rate


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


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_setting_the_learning_rate_reaches_every_group(kind: str) -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(kind=kind))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
