"""The average of the weights against its closed form and a NumPy recursion."""

import numpy as np
import pytest
import torch
from torch import nn

from cascade.config.training import EMAConfig
from cascade.resources.memory import LiveBytes
from cascade.training.weights import EMA


def network_of(value: float) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    return network


def set_weight(network: nn.Linear, value: float) -> None:
    nn.init.constant_(network.weight, value)


def test_a_contribution_halves_after_the_half_life() -> None:
    network = network_of(1.0)
    ema = EMA(network, EMAConfig(half_life_images=64, warmup=False))
    set_weight(network, 0.0)
    for step in range(1, 9):  # 8 steps of 8 pictures
        ema.update(network, 8 * step, 8)
    assert ema.weights["weight"].item() == pytest.approx(0.5)


def test_warmup_shortens_the_half_life_to_a_fifth_of_the_pictures_seen() -> None:
    ema = EMA(network_of(0.0), EMAConfig(half_life_images=1000))
    assert ema.decay(images_seen=100, batch_size=10) == pytest.approx(0.5 ** (10 / 20))
    assert ema.decay(images_seen=1_000_000, batch_size=10) == pytest.approx(0.5 ** (10 / 1000))


def test_the_average_equals_a_recursion_in_numpy() -> None:
    rng = np.random.default_rng(0)
    network = nn.Linear(3, 2)
    ema = EMA(network, EMAConfig(half_life_images=50))
    expected = {name: p.detach().double().numpy().copy() for name, p in network.named_parameters()}
    for step in range(1, 21):
        decay = 0.5 ** (4 / min(50, 0.2 * 4 * step))
        for name, parameter in network.named_parameters():
            fresh = rng.normal(size=parameter.shape)
            parameter.data.copy_(torch.from_numpy(fresh))
            expected[name] = decay * expected[name] + (1 - decay) * fresh
        ema.update(network, 4 * step, 4)
    for name, value in ema.weights.items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-6)  # 20 roundings of float32


def test_a_doubled_batch_averages_over_the_same_data() -> None:
    """Weights that change every 16 pictures: seen in steps of 8 or of 16, the average is the same."""
    small, large = (EMA(network_of(0.0), EMAConfig(half_life_images=100, warmup=False)) for _ in range(2))
    for step in range(1, 11):
        network = network_of(float(step))
        small.update(network, 16 * step - 8, 8)
        small.update(network, 16 * step, 8)
        large.update(network, 16 * step, 16)
    assert small.weights["weight"].item() == pytest.approx(large.weights["weight"].item(), rel=1e-5)


def test_the_distance_is_that_between_the_averages_and_the_weights() -> None:
    network = network_of(1.0)
    ema = EMA(network, EMAConfig())
    assert ema.distance(network) == 0
    set_weight(network, 4.0)
    assert ema.distance(network) == pytest.approx(3 / 4)


def test_the_distance_needs_no_second_copy_of_the_weights() -> None:
    network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    ema = EMA(network, EMAConfig(half_life_images=64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)  # the average lies at two thirds of each, so a third of its norm away
    with LiveBytes() as live:
        assert ema.distance(network) == pytest.approx(1 / 3)
    held = sum(parameter.numel() * 4 for parameter in network.parameters())  # the mode counts what it sees used
    assert live.peak < held + 2 * 64 * 64 * 4
