"""Interquartile means, bootstrap intervals and probabilities of improvement against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.errors import UserError
from leap_shared.offline.statistics import bootstrap, interquartile_mean, probability_of_improvement


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4))
def test_the_interquartile_mean_is_the_mean_of_the_middle_half(seed: int, runs: int, tasks: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(runs, tasks))
    flat, cut = np.sort(scores.ravel()), scores.size // 4
    assert interquartile_mean(scores) == pytest.approx(flat[cut : scores.size - cut].mean())


def test_outliers_do_not_move_the_interquartile_mean() -> None:
    scores = np.arange(8.0)[:, None]
    spoiled = scores.copy()
    spoiled[-1] = 1e9
    assert interquartile_mean(spoiled) == interquartile_mean(scores) == 3.5


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    scores = np.random.default_rng(0).normal(10, 2, size=(200, 1))
    found = bootstrap(scores, lambda x: x.mean(axis=(-2, -1)), seed=1)
    reach = 1.96 * scores.std() / np.sqrt(200)
    assert found.value == scores.mean()
    assert found.low == pytest.approx(scores.mean() - reach, abs=0.1 * reach)  # 10,000 resamples: 2% of a quantile
    assert found.high == pytest.approx(scores.mean() + reach, abs=0.1 * reach)


def test_one_run_shows_no_spread() -> None:
    found = bootstrap(np.array([[5.0]]))
    assert (found.low, found.value, found.high) == (-np.inf, 5.0, np.inf)
    chance = probability_of_improvement(np.array([[5.0]]), np.array([[1.0], [2.0]]))
    assert (chance.low, chance.value, chance.high) == (0.0, 1.0, 1.0)


def test_tasks_are_strata_that_never_mix() -> None:
    scores = np.array([[0.0, 100.0]] * 5)
    found = bootstrap(scores, lambda x: x.mean(axis=(-2, -1)))
    assert (found.low, found.value, found.high) == (50.0, 50.0, 50.0)


def test_improvement_is_the_share_of_won_pairs_with_ties_halved() -> None:
    ours, theirs = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [2.0]])
    assert probability_of_improvement(ours, theirs).value == pytest.approx((0 + 0.5 + 1) / 3)
    sure = probability_of_improvement(ours + 10, theirs)
    assert (sure.low, sure.value, sure.high) == (1.0, 1.0, 1.0)


@given(st.integers(0, 10**6))
def test_improvements_of_two_methods_over_each_other_sum_to_one(seed: int) -> None:
    one, other = np.random.default_rng(seed).integers(0, 4, (2, 5, 3)).astype(float)
    both = [probability_of_improvement(*pair, resamples=10).value for pair in ((one, other), (other, one))]
    assert sum(both) == pytest.approx(1.0)


def test_scores_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(0, 1\) are empty or not finite"):
        bootstrap(np.empty((0, 1)))
    with pytest.raises(UserError, match="not finite"):
        bootstrap(np.array([[np.nan]]))
    with pytest.raises(UserError, match="give the same tasks"):
        probability_of_improvement(np.zeros((2, 1)), np.zeros((2, 2)))
