"""Priorities: their numbers, their files and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import walk
from hypothesis import given
from hypothesis import strategies as st

from leap_oper import Priorities, oper_r
from leap_oper.priorities import advantage_weights, top_rows
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


@pytest.mark.parametrize("how", ["mean", "median"])
def test_ensemble_of_one_seed_is_itself(how: str) -> None:
    single = Priorities(np.array([[[0.5, 1.5], [1.8, 0.2]]])).at(2)
    np.testing.assert_allclose(single.ensemble(how).weights, [1.8, 0.2])
    np.testing.assert_allclose(single.probs, [0.9, 0.1])


def test_runs_stack_to_seeds() -> None:
    parts = [Priorities(np.array([0.5, 1.5]), {"seeds": [s]}) for s in (3, 4)]
    together = Priorities.stack(parts)
    np.testing.assert_allclose(together.weights, [[0.5, 1.5]] * 2)
    assert together.meta["seeds"] == [3, 4]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "do not stack"),
        ([Priorities(np.ones(2)), Priorities(np.ones(3))], r"\(1, 2\), \(1, 3\)\] do not stack"),
        ([Priorities(np.ones(2), {"fingerprint": name}) for name in "ab"], "made for different data"),
    ],
)
def test_runs_of_other_data_do_not_stack(parts: list[Priorities], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Priorities.stack(parts)


def test_summary_counts_what_is_drawn() -> None:
    summary = Priorities(np.array([2.0, 2.0, 0.0, 0.0]), {"method": "oper_r"}).summary()
    assert summary == {
        "method": "oper_r",
        "rows": 4,
        "std": 1.0,
        "effective_sample_size": 2.0,
        "min": 0.0,
        "max": 2.0,
        "rows_never_drawn": 2,
    }


def test_summary_lists_seeds_and_iterations() -> None:
    weights = np.random.default_rng(0).exponential(size=(2, 5, 30))
    summary = Priorities(weights).summary()
    np.testing.assert_allclose(summary["std"], Priorities(weights).weights.std(axis=-1))
    assert summary["effective_sample_size"][1][4] == pytest.approx(
        Priorities(weights[1, 4]).effective_sample_size, rel=1e-9
    )


def test_floor_brings_lost_rows_back() -> None:
    np.testing.assert_allclose(Priorities(np.array([0.0, 2.0])).floored(0.5).weights, [0.4, 1.6])


@pytest.mark.parametrize("floor", [-0.1, 1.0, np.nan])
def test_floor_that_is_none_is_refused(floor: float) -> None:
    with pytest.raises(UserError, match="floor is"):
        Priorities(np.arange(3.0)).floored(floor)


@pytest.mark.parametrize(
    ("update", "want"), [(0, 1.0), (999, 1.0), (1000, 1 + 1 / 800), (400_000, 1.5), (800_000, 2.0), (10**9, 2.0)]
)
def test_progressive_balancing_goes_from_uniform_to_the_weights_block_by_block(update: int, want: float) -> None:
    balanced = Priorities(np.array([0.0, 2.0])).balanced(update).weights
    np.testing.assert_allclose(balanced, [2 - want, want], atol=1e-15)


def test_balance_of_an_update_before_the_first_is_refused() -> None:
    with pytest.raises(UserError, match="update=-1"):
        Priorities(np.ones(2)).balanced(-1)


def test_top_rows_keep_ties_of_the_percentile_over_rows() -> None:
    returns = np.repeat([1.0, 5.0, 2.0], [50, 30, 20])
    assert top_rows(returns, 10.0).tolist() == list(range(50, 80))
    assert len(top_rows(returns[:, None], 100.0)) == 100


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.1, 100))
def test_top_rows_are_the_best_and_at_least_their_share(returns: list[float], percent: float) -> None:
    kept = top_rows(returns, percent)
    lost = np.delete(returns, kept)
    assert len(kept) >= 1
    assert not len(lost) or max(lost) < min(np.array(returns)[kept])
    assert len(kept) >= (len(returns) - 1) * percent / 100 - 1e-6


@pytest.mark.parametrize(
    ("returns", "percent", "message"),
    [([1.0], 0.0, "percent is 0"), ([1.0], 101.0, "percent is 101"), ([], 10.0, "finite"), ([np.nan], 10.0, "finite")],
)
def test_top_rows_of_nothing_are_refused(returns: list[float], percent: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        top_rows(returns, percent)


def test_floor_keeps_the_row_of_least_advantage() -> None:
    np.testing.assert_allclose(
        advantage_weights(np.ones(3), [0.0, 1.0, 2.0], floor=0.2), np.array([0.2, 1, 2]) / 3.2 * 3
    )


def test_row_of_least_advantage_never_comes_back() -> None:
    first = advantage_weights(np.ones(3), [0.0, 1.0, 2.0])
    assert advantage_weights(first, [9.0, 1.0, 0.5])[0] == 0.0


def test_saved_priorities_come_back_and_know_their_data(tmp_path: Path) -> None:
    data = walk()
    oper_r(data, base_prob=0.1).save(tmp_path / "w.npz")
    loaded = Priorities.load(tmp_path / "w.npz", data)
    np.testing.assert_allclose(loaded.weights, oper_r(data, base_prob=0.1).weights, rtol=1e-6)
    assert loaded.meta["base_prob"] == 0.1


@pytest.mark.parametrize("shape", [(2, 30), (1, 30), (2, 5, 30), (1, 5, 30)])
def test_seeds_and_iterations_are_kept_in_the_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stacked = Priorities(np.random.default_rng(0).exponential(size=shape), {"seeds": [1, 2]})
    stacked.save(tmp_path / "w.npz")
    loaded = Priorities.load(tmp_path / "w.npz")
    assert loaded.weights.shape == shape
    np.testing.assert_allclose(loaded.weights, stacked.weights, rtol=1e-6)
    assert loaded.meta["seeds"] == [1, 2]


def test_file_holds_one_weight_per_row_whatever_is_stacked(tmp_path: Path) -> None:
    stacked = Priorities(np.random.default_rng(0).exponential(size=(2, 5, 30)))
    stacked.save(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as file:
        assert file["weights"].dtype == np.float32
        np.testing.assert_allclose(file["weights"], stacked.at(5).ensemble().weights, rtol=1e-6)
        assert set(json.loads(str(file["meta"]))["versions"]) == {"leap-oper", "numpy", "torch"}


def test_iteration_of_a_file_is_taken(tmp_path: Path) -> None:
    stacked = Priorities(np.random.default_rng(0).exponential(size=(2, 5, 30)))
    stacked.save(tmp_path / "w.npz")
    np.testing.assert_allclose(
        Priorities.load(tmp_path / "w.npz", iteration=3).weights, stacked.at(3).weights, rtol=1e-6
    )
    with pytest.raises(UserError, match="iteration 6 is not among the 5 stored"):
        Priorities.load(tmp_path / "w.npz", iteration=6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text"])
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.npz holds no priorities"):
        Priorities.load(tmp_path / "w.npz")


def test_file_without_origin_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weights=np.ones(3))
    with pytest.raises(UserError, match="holds no priorities: 'meta"):
        Priorities.load(tmp_path / "w.npz")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.npz holds no priorities: .*No such file"):
        Priorities.load(tmp_path / "none.npz")


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0.0}, "std is 0.0: give a deviation above 0"),
        ({"std": np.nan}, "std is nan"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": 0.5, "eps_max": 0.5}, "give 0 <= eps < eps_max"),
    ],
)
def test_rescaling_to_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Priorities(np.arange(5.0)).rescale(**arguments)


def test_large_floor_warns() -> None:
    with pytest.warns(UserWarning, match="nearly uniform"):
        Priorities(np.arange(5.0)).rescale(std=2.0, eps=1.0)


def test_iteration_beyond_the_stored_ones_is_refused() -> None:
    with pytest.raises(UserError, match="iteration 6 is not among the 5 stored"):
        Priorities(np.ones((2, 5, 3))).at(iteration=6)


def test_seeds_must_be_joined_before_drawing() -> None:
    with pytest.raises(UserError, match=r"call \.at\(iteration=\.\.\.\) and \.ensemble\(\) first"):
        _ = Priorities(np.ones((2, 5, 3))).probs


@pytest.mark.parametrize("advantages", [[1.0, 1.0], [1.0, np.inf]])
def test_advantages_without_an_order_are_refused(advantages: list[float]) -> None:
    with pytest.raises(UserError, match="order no rows"):
        advantage_weights(np.ones(2), advantages)


def test_exp_with_a_deviation_is_refused() -> None:
    with pytest.raises(UserError, match="pass std=None"):
        Priorities(np.arange(5.0)).rescale(std=2.0, weight_func="exp")


@pytest.mark.parametrize("arguments", [{"weight_func": "power"}, {"branch": "sac"}])
def test_recipes_that_the_reference_does_not_have_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="use td3, onestep or iql; linear or exp"):
        Priorities(np.arange(5.0)).rescale(**arguments)
