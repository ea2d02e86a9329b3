"""scripts/sweep_sampling.py: the column "of best", and the number of calls of a line."""

from __future__ import annotations

import pytest
from sweep_sampling import DISTANCE, Setting, of_best, settings


def test_the_best_row_stands_at_one_and_the_others_below_it() -> None:
    rows = [{"right": 0.8, DISTANCE: 0.5}, {"right": 0.4, DISTANCE: 0.25}, {"right": 0.8, DISTANCE: 0.25}]
    assert of_best(rows) == pytest.approx([0.75, 0.75, 1.0])


def test_the_best_row_need_not_be_best_in_every_column() -> None:
    assert max(of_best([{"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 1.0}, {"a": 0.9, "b": 0.9}])) == 1


def test_a_column_in_which_nothing_scores_says_nothing() -> None:
    assert of_best([{"right": 0.0, "other": 0.5}, {"right": 0.0, "other": 1.0}]) == [0.5, 1]


@pytest.mark.parametrize(("sampler", "asked", "made"), [("dpm++", 16, 16), ("heun", 16, 15), ("heun", 47, 47)])
def test_calls_are_those_that_the_sampler_makes(sampler: str, asked: int, made: int) -> None:
    assert Setting(sampler, asked, 3.0, None).calls_made == made


def test_no_line_comes_twice_and_the_model_s_own_is_among_them() -> None:
    own = Setting("dpm++", 16, 3.0, (-12, 1))
    lines = list(settings(own, ["dpm++"], [8, 16], [3.0, 4.0], [(-12, 1)]))
    assert len(lines) == len(set(lines)) == 3
    assert own in lines
