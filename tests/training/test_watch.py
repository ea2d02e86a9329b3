"""Early warnings, on artificial series."""

import random
from collections.abc import Sequence

import pytest

from cascade.training.watch import Watch, dead_gradients, loss_spike, stale_average


def entries(name: str, values: Sequence[float]) -> list[dict[str, float]]:
    return [{"step": index, name: value} for index, value in enumerate(values)]


def noisy(count: int, level: float = 1.0, spread: float = 0.05, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0, spread) for _ in range(count)]


def falling(count: int) -> list[float]:
    return [1 / (1 + step) for step in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_spike(seed: int) -> None:
    losses = noisy(100, seed=seed)
    assert not any(loss_spike(entries("loss", losses[:count])) for count in range(1, 101))


def test_a_falling_and_a_constant_loss_are_no_spike() -> None:
    for losses in (falling(50), [0.3] * 50):
        assert not any(loss_spike(entries("loss", losses[:count])) for count in range(1, 51))


def test_a_spike_is_named_with_what_it_rose_from() -> None:
    line = loss_spike(entries("loss", [*noisy(30), 4.0]))
    assert line is not None
    assert line.startswith("the loss is 4, after 0.9803 in the middle of the last 20 entries; if it stays there, stop")
    assert "delete its checkpoints of steps after 29 (" in line  # the last entry that was sound


def test_the_start_of_a_run_is_not_judged() -> None:
    assert loss_spike(entries("loss", [1.0, 1.0, 9.0])) is None


def test_gradients_that_vanish_are_dead_and_those_that_shrink_are_not() -> None:
    assert dead_gradients(entries("gradient_norm", [*noisy(20), 1e-5, 1e-5, 1e-5])) is not None
    assert dead_gradients(entries("gradient_norm", [*noisy(20), 1e-5, 1e-5])) is None  # not yet three in a row
    assert dead_gradients(entries("gradient_norm", [*noisy(20), 0.05, 0.05, 0.05])) is None


def test_a_gradient_that_is_zero_from_the_start_is_dead() -> None:
    assert dead_gradients(entries("gradient_norm", [0.0, 0.0, 0.0])) is not None
    assert dead_gradients(entries("gradient_norm", [1.0, 0.0, 0.0])) is None


def test_an_average_that_stays_far_away_is_stale_and_one_that_comes_closer_is_not() -> None:
    assert stale_average(entries("ema_distance", [0.2] * 9 + [0.6, 0.7, 0.8])) is not None
    assert stale_average(entries("ema_distance", [0.9] * 9 + [0.8, 0.7, 0.6])) is None
    assert stale_average(entries("ema_distance", [0.05] * 12)) is None


def test_entries_without_the_quantity_and_numbers_that_are_none_are_passed_over() -> None:
    mixed = [*entries("loss", noisy(20)), {"step": 20, "validation_loss": 1.0}, {"step": 21, "loss": float("nan")}]
    assert loss_spike(mixed) is None
    assert loss_spike([*mixed, {"step": 22, "loss": 5.0}]) is not None


def test_a_warning_is_given_once_while_it_holds_and_again_when_it_returns() -> None:
    watch, said = Watch(), []
    losses = [*noisy(30), 4.0, 4.0, *noisy(30, seed=1), 4.0]
    for count in range(1, len(losses) + 1):
        said += [count for _ in watch.new_warnings(entries("loss", losses[:count]))]
    assert said == [31, 63]
