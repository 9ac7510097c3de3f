"""Priorities: their numbers, their files and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data import walk
from hypothesis import given
from hypothesis import strategies as st

from leap_oper import Priorities, oper_r
from leap_oper.priorities import advantage_weights
from leap_shared.errors import UserError
from leap_shared.offline import Transitions


def rewards_of(returns: list[float], length: int = 10) -> np.ndarray:
    rewards = np.zeros((len(returns), length))
    rewards[:, 3] = returns
    return rewards.reshape(-1)


def test_weights_follow_the_return_of_the_whole_episode() -> None:
    weights = oper_r(walk(3, rewards=rewards_of([1.0, 2.0, 3.0]))).weights.reshape(3, 10)
    np.testing.assert_allclose(weights, [[0.0] * 10, [1.0] * 10, [2.0] * 10], atol=1e-6)


def test_base_probability_keeps_the_worst_episode() -> None:
    weights = oper_r(walk(2, rewards=rewards_of([0.0, 5.0])), base_prob=0.2).weights
    assert weights.max() / weights.min() == pytest.approx(6.0)


def test_inverse_prefers_low_returns() -> None:
    weights = oper_r(walk(2, rewards=rewards_of([0.0, 5.0])), variant="inverse").weights
    assert weights[0] == pytest.approx(2.0)
    assert weights[-1] == 0.0


def test_reward_variant_weighs_single_rows() -> None:
    assert np.flatnonzero(oper_r(walk(2, rewards=rewards_of([0.0, 5.0])), variant="reward").weights).tolist() == [13]


def test_equal_returns_warn_and_give_uniform_weights() -> None:
    with pytest.warns(UserWarning, match="all returns are 1"):
        weights = oper_r(walk(4, rewards=rewards_of([1.0] * 4))).weights
    np.testing.assert_array_equal(weights, 1.0)


@given(st.permutations(range(5)), st.floats(0.1, 100.0))
def test_order_of_episodes_and_scale_of_rewards_do_not_matter(order: list[int], scale: float) -> None:
    returns = np.array([0.0, 1.0, -2.0, 3.5, 10.0])
    plain = oper_r(walk(5, rewards=rewards_of(list(returns)))).weights.reshape(5, 10)
    permuted = oper_r(walk(5, rewards=rewards_of(list(scale * returns[order])))).weights.reshape(5, 10)
    np.testing.assert_allclose(permuted, plain[order], atol=1e-5)


def test_rescaling_reports_the_deviation_that_the_floor_leaves() -> None:
    weights = Priorities(np.random.default_rng(0).exponential(size=1000))
    assert weights.rescale(std=0.5, eps=None).std == pytest.approx(0.5, rel=0.02)
    assert weights.rescale(std=3.0, eps=0.1).std < 2.99


def test_no_floor_still_gives_no_negative_probability() -> None:
    assert Priorities(np.arange(1.0, 101.0)).rescale(std=4.0, eps=0.0).probs.min() == 0.0


def test_effective_sample_size_counts_equal_rows() -> None:
    assert Priorities(np.array([1.0] * 5 + [0.0] * 95)).effective_sample_size == pytest.approx(5.0)


def test_median_of_two_seeds_is_their_mean() -> None:
    stacked = Priorities(np.array([[0.5, 1.5], [1.5, 0.5]]))
    np.testing.assert_allclose(stacked.ensemble("median").weights, 1.0)


def test_row_of_least_advantage_never_comes_back() -> None:
    first = advantage_weights(np.ones(3), [0.0, 1.0, 2.0])
    assert advantage_weights(first, [9.0, 1.0, 0.5])[0] == 0.0


def test_saved_priorities_come_back_and_know_their_data(tmp_path: Path) -> None:
    data = walk()
    oper_r(data, base_prob=0.1).save(tmp_path / "w.npz")
    loaded = Priorities.load(tmp_path / "w.npz", data)
    np.testing.assert_allclose(loaded.weights, oper_r(data, base_prob=0.1).weights, rtol=1e-6)
    assert loaded.meta["base_prob"] == 0.1


@pytest.mark.parametrize(
    ("other", "message"), [(walk(seed=1), "made for other data"), (walk(7), "60 weights for 70 rows")]
)
def test_weights_of_other_data_are_refused(tmp_path: Path, other: Transitions, message: str) -> None:
    oper_r(walk()).save(tmp_path / "w.npz")
    with pytest.raises(UserError, match=message):
        Priorities.load(tmp_path / "w.npz", other)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, np.nan], "1 weights are NaN or infinite, the first in row 1"),
        ([-1.0, 2.0], "1 weights are negative, the first in row 0"),
        ([0.0, 0.0], "all weights are zero"),
        ([[[[1.0]]]], "expected one of"),
    ],
)
def test_weights_that_cannot_be_drawn_by_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Priorities(np.array(weights))


def test_deviation_of_constant_weights_is_refused() -> None:
    with pytest.raises(UserError, match="constant"):
        Priorities(np.ones(5)).rescale(std=2.0)


def test_large_floor_warns() -> None:
    with pytest.warns(UserWarning, match="nearly uniform"):
        Priorities(np.arange(5.0)).rescale(std=2.0, eps=1.0)


def test_iteration_beyond_the_stored_ones_is_refused() -> None:
    with pytest.raises(UserError, match="iteration 6 is not among the 5 stored"):
        Priorities(np.ones((2, 5, 3))).at(iteration=6)


def test_seeds_must_be_joined_before_drawing() -> None:
    with pytest.raises(UserError, match=r"call \.at\(iteration=\.\.\.\) and \.ensemble\(\) first"):
        _ = Priorities(np.ones((2, 5, 3))).probs


def test_file_that_needs_unpickling_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.array({"iter": 5}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="holds no priorities"):
        Priorities.load(tmp_path / "w.npy")


@pytest.mark.parametrize("advantages", [[1.0, 1.0], [1.0, np.inf]])
def test_advantages_without_an_order_are_refused(advantages: list[float]) -> None:
    with pytest.raises(UserError, match="order no rows"):
        advantage_weights(np.ones(2), advantages)


def test_exp_with_a_deviation_is_refused() -> None:
    with pytest.raises(UserError, match="pass std=None"):
        Priorities(np.arange(5.0)).rescale(std=2.0, weight_func="exp")


@pytest.mark.parametrize("arguments", [{"weight_func": "power"}, {"branch": "sac"}])
def test_recipes_that_the_reference_does_not_have_are_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(UserError, match="use td3, onestep or iql; linear or exp"):
        Priorities(np.arange(5.0)).rescale(**arguments)
