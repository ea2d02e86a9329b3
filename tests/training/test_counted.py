"""Counter-based noise: known values, a normal distribution, and the same in any batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cascade.seeds import derive_seed
from cascade.training.step import _GOLDEN, NoiseSource, _mixed, counted_noise, draw_noise

KEYS = torch.tensor([derive_seed("view", number) for number in range(64)])


def test_the_bits_are_those_of_splitmix64() -> None:
    """Steele et al.'s generator from seed 1234567, as its published implementations print it."""
    state = _mixed(1234567 + _GOLDEN * torch.arange(1, 4))
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [bits % 2**64 for bits in state.tolist()] == known


def test_the_noise_is_normal_and_no_two_places_or_keys_know_of_each_other() -> None:
    noise = counted_noise(KEYS, (3, 64, 64))
    assert noise.dtype == torch.float32
    values = noise.flatten()
    count = len(values)  # 786,432: a mean's standard deviation is 1.1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((values.double() ** power).mean()) == pytest.approx(moment, abs=4 * math.sqrt(variance / count))
    shares = torch.special.ndtr(values.double()).sort().values  # uniform, if the noise is normal
    steps = torch.arange(count) / count
    assert float((shares - steps).abs().max()) < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov at 1 %
    for shift in (1, 64, 4096, 6144, 12288):  # neighbours, rows, channels, the two of a pair, pictures
        together = float((values[shift:] * values[:-shift]).double().mean())
        assert abs(together) < 4 / math.sqrt(count), shift


def test_a_view_has_the_same_noise_in_any_batch_and_other_noise_than_any_other() -> None:
    both, alone = counted_noise(KEYS[:2], (3, 5, 7)), counted_noise(KEYS[1:2], (3, 5, 7))
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[0], both[1])


class There:
    """A device of another type than a CPU whose tensors lie on the CPU."""

    type = "cuda"


def test_noise_for_a_gpu_is_a_function_of_seed_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.training.step.on_device", lambda tensor, _device: tensor)
    device: Any = There()

    def drawn(samples: list[int], seed: int = 0) -> Any:
        return draw_noise(samples, (3, 8, 8), (3, 4, 4), NoiseSource(seed, 0.3, device=device))

    both, alone, other = drawn([3, 7]), drawn([7]), drawn([7], seed=1)
    for name in ("u", "eps", "aug_level", "aug_eps"):
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name))
        assert not torch.equal(getattr(other, name), getattr(alone, name))
    assert both.aug_eps.shape == (2, 3, 4, 4)
    assert not torch.equal(both.eps[:, :, :4, :4], both.aug_eps)
    many = drawn(list(range(4000)))
    for values, most in ((many.u, 1.0), (many.aug_level, 0.3)):
        assert 0 <= float(values.min()) <= float(values.max()) < most
        assert float(values.mean()) == pytest.approx(most / 2, abs=4 * most / math.sqrt(12 * 4000))
    assert abs(np.corrcoef(many.u, many.aug_level)[0, 1]) < 4 / math.sqrt(4000)
