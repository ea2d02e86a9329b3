"""Distances between sets whose answers are known beforehand."""

from __future__ import annotations

import pytest
import torch

from cascade.evaluation.distances import kernel_distance, near_copies, precision_and_recall, sliced_wasserstein


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_shift_moves_the_sliced_distance_by_its_share_in_a_direction():
    """Moving a set by d changes each projection by d.u, and the mean of (d.u)^2 over directions is |d|^2 / D."""
    points = normal(400, 8, 0)
    moved = points + 3.0 * torch.eye(8, dtype=torch.float64)[0]
    # 512 directions: (d.u)^2 has a relative deviation of about 1.2, its mean of 1.2 / sqrt(512) = 5 %
    assert sliced_wasserstein(points, moved, directions()) == pytest.approx(3 / 8**0.5, rel=0.1)


def test_a_set_has_no_sliced_distance_to_itself_in_another_order():
    points = normal(300, 8, 0)
    assert sliced_wasserstein(points, points.flip(0), directions()) == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_of_equal_laws_is_zero_on_average():
    """Unbiased: over 40 pairs of samples the mean is within three standard errors of zero, and some are below it."""
    values = torch.tensor([kernel_distance(normal(60, 4, 2 * seed), normal(80, 4, 2 * seed + 1)) for seed in range(40)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 40**0.5
    assert (values < 0).any()


def test_the_kernel_distance_is_the_one_written_out():
    one, other = normal(5, 3, 0), normal(7, 3, 1)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_one = [k(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j]
    within_other = [k(x, y) for i, x in enumerate(other) for j, y in enumerate(other) if i != j]
    across = [k(x, y) for x in one for y in other]
    expected = sum(within_one) / 20 + sum(within_other) / 42 - 2 * sum(across) / 35
    assert kernel_distance(one, other) == pytest.approx(expected)


def test_a_subset_is_precise_and_lacks_recall():
    """Two far clusters: whoever draws one of them is precise, and reaches half of the truth."""
    true = torch.cat([normal(50, 4, 0), normal(50, 4, 1) + 100])
    assert precision_and_recall(true, true) == (1, 1)
    precision, recall = precision_and_recall(true, true[:50] + 1e-9)
    assert (precision, recall) == (1, 0.5)
    assert precision_and_recall(true, true + 1000) == (0, 0)


def test_a_picture_near_a_training_picture_is_a_near_copy():
    training = torch.tensor([[0.0, 0.0], [0.1, 0.0], [10.0, 0.0], [0.0, 10.0]])
    subjects = torch.tensor([0, 0, 1, 2])
    drawn = torch.tensor([[0.05, 0.05], [5.0, 0.0], [2.6, 0.0], [2.4, 0.0]])
    # To the other subjects: 10 from the first; the third and fourth stand on both sides of the ratio 1/3.
    assert near_copies(drawn, training, subjects) == [True, False, False, True]


def test_a_subject_drawn_twice_in_training_does_not_hide_a_copy():
    training = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0]])
    assert near_copies(torch.tensor([[0.1, 0.0]]), training, torch.tensor([0, 0, 1])) == [True]
