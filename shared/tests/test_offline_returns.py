"""Returns, returns to go and n-step returns against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.errors import UserError
from leap_shared.offline import discounted_return_to_go, episode_returns, n_step, state_normalisation

STEPS = st.lists(st.tuples(st.floats(-10, 10, width=32), st.booleans()), min_size=1, max_size=70)


def split(steps: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    rewards, ends = zip(*steps, strict=True)
    return np.array(rewards, np.float32), np.array(ends)


@given(STEPS)
def test_returns_are_summed_in_order_in_float32(steps: list[tuple[float, bool]]) -> None:
    rewards, ends = split(steps)
    want, start = np.empty_like(rewards), 0
    for row in range(len(rewards)):
        if ends[row] or row == len(rewards) - 1:
            total = np.float32(0)
            for reward in rewards[start : row + 1]:
                total = np.float32(total + reward)
            want[start : row + 1] = total
            start = row + 1
    np.testing.assert_array_equal(episode_returns(rewards, ends), want)


def test_episodes_of_any_length_are_summed_in_the_same_order() -> None:
    lengths = [1, 31, 32, 33, 1, 1, 700]
    rewards = np.random.default_rng(0).standard_normal(sum(lengths)).astype(np.float32)
    last = np.cumsum(lengths) - 1
    want = [
        np.add.accumulate(rewards[stop + 1 - length : stop + 1])[-1] for stop, length in zip(last, lengths, strict=True)
    ]
    ends = np.isin(np.arange(len(rewards)), last)
    np.testing.assert_array_equal(episode_returns(rewards, ends)[last], want)


@given(STEPS, st.floats(0.1, 1.0))
def test_return_to_go_is_the_backward_recursion(steps: list[tuple[float, bool]], discount: float) -> None:
    rewards, ends = split(steps)
    want, after = np.empty(len(rewards)), 0.0
    for row in reversed(range(len(rewards))):
        after = float(rewards[row]) + (0.0 if ends[row] else discount * after)
        want[row] = after
    np.testing.assert_allclose(discounted_return_to_go(rewards, ends, discount), want, atol=1e-9)


@given(STEPS, st.integers(1, 6))
def test_n_step_return_stops_after_the_first_end(steps: list[tuple[float, bool]], n: int) -> None:
    rewards, ends = split(steps)
    n = min(n, len(rewards))
    following = np.arange(len(rewards), dtype=np.float32)[:, None] + 1
    result = n_step(rewards, following, ends, 0.9, n)
    for row in range(len(rewards)):
        want, done = 0.0, False
        for k in range(min(n, len(rewards) - row)):
            want += 0.9**k * float(rewards[row + k])
            if ends[row + k]:
                done = True
                break
        assert result.returns[row] == pytest.approx(want, abs=1e-5)
        assert result.done[row] == done
        assert result.states[row] == (row + n if row + n <= len(rewards) else 0)


def test_n_step_longer_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="n_step is 4: give 1 to 3"):
        n_step(np.zeros(3, np.float32), np.zeros((3, 1), np.float32), np.zeros(3, bool), 0.9, 4)


def test_constant_state_is_normalised_without_division_by_zero() -> None:
    scale = state_normalisation(np.full((4, 1), 7.0, np.float32))
    assert scale.std[0] == pytest.approx(1e-3)
