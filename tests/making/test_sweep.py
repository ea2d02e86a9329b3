"""The choice of steps and guidance."""

from __future__ import annotations

import torch

from cascade.making.trials import Trial, best, match


def test_the_match_of_the_true_pictures_themselves_is_highest_and_that_of_shuffled_ones_is_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(16, 32, generator=generator)
    noisy = true + torch.randn(16, 32, generator=generator)
    shuffled = true.roll(1, dims=0)
    assert match(true, true) > 0.9  # a cosine of 1, less that of others, about 0
    assert match(true, true) > match(true, noisy) > 0.3
    assert match(true, shuffled) < 0.1


def test_a_setting_that_is_best_in_both_figures_is_chosen() -> None:
    good = Trial(16, 2.0, distance=0.1, match=0.5)
    assert best([Trial(16, 1.0, 0.3, 0.2), good, Trial(16, 5.0, 0.9, 0.4)]) == good


def test_of_nearly_equal_settings_the_one_with_fewer_calls_is_chosen() -> None:
    quick, slow = Trial(8, 2.0, 1.02, 0.49), Trial(32, 2.0, 1.0, 0.5)
    assert best([slow, quick]) == quick
    assert best([slow, Trial(8, 2.0, 2.0, 0.3)]) == slow


def test_a_step_without_guidance_is_one_call_and_with_guidance_two() -> None:
    assert [Trial(8, guidance, 0, 0).calls for guidance in (1.0, 2.0)] == [8, 16]
