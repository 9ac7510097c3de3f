"""Transitions: what enters is checked, raw steps are converted, files come back."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_shared.errors import UserError
from leap_shared.offline import Transitions, convert, episode_ends


def arrays(rows: int = 6, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    states = random.standard_normal((rows + 1, 3))
    given = {
        "observations": states[:-1],
        "actions": random.uniform(-1, 1, (rows, 2)),
        "rewards": random.standard_normal(rows),
        "next_observations": states[1:],
        "terminals": np.zeros(rows),
    }
    return given | changes


def test_arrays_become_float32_and_bool_whatever_they_were() -> None:
    data = Transitions.from_arrays(
        **arrays(rewards=np.ones((6, 1), np.int64), terminals=np.array([[0.0]] * 5 + [[1.0]]))
    )
    assert [data.rewards.dtype, data.observations.dtype] == [np.float32, np.float32]
    assert data.rewards.shape == (6,)
    assert data.terminals.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": np.zeros(5)}, "rewards has 5 rows and observations has 6"),
        ({"rewards": np.zeros((6, 2))}, r"rewards has shape \(6, 2\), expected \(rows,\) or \(rows, 1\)"),
        ({"observations": np.zeros(6)}, r"observations has shape \(6,\), expected \(rows, width\)"),
        ({"next_observations": np.zeros((6, 2))}, "must have one shape"),
        ({"terminals": np.full(6, 0.5)}, "terminals must be 0 or 1, row 0 is neither"),
        ({"timeouts": np.array([0, 0, 2, 0, 0, 0])}, "timeouts must be 0 or 1, row 2 is neither"),
        ({"actions": np.full((6, 2), 1.5)}, r"actions reach 1.5, outside \[-1, 1\]"),
        ({"rewards": np.array([0, 0, np.nan, 0, 0, 0])}, "rewards is NaN or infinite in float32 at row 2"),
        ({"observations": np.full((6, 3), 1e300)}, "observations is NaN or infinite in float32 at row 0"),
        ({"observations": np.array([{"a": 1}] * 6, dtype=object)[:, None]}, "of Dict observations choose the keys"),
        ({"next_observations": None}, "no timeouts: give max_episode_steps"),
    ],
)
def test_bad_arrays_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Transitions.from_arrays(**arrays(**changes))


def test_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        Transitions.from_arrays(**arrays(rows=1))


def test_raw_steps_lose_timeouts_and_the_last_step() -> None:
    timeouts = np.array([0, 0, 1, 0, 0, 0])
    data = Transitions.from_arrays(**arrays(next_observations=None, timeouts=timeouts))
    assert len(data) == 4
    np.testing.assert_array_equal(data.next_observations[2], np.float32(arrays()["observations"][4]))


def test_ends_are_jumps_terminals_timeouts_and_the_last_row() -> None:
    following = arrays()["next_observations"].copy()
    following[1] += 1.0
    timeouts = np.array([0, 0, 0, 1, 0, 0])
    terminals = np.array([1, 0, 0, 0, 0, 0])
    data = Transitions.from_arrays(**arrays(next_observations=following, terminals=terminals, timeouts=timeouts))
    assert np.flatnonzero(data.ends).tolist() == [0, 1, 3, 5]
    ends = episode_ends(data.observations, data.next_observations, data.terminals)
    assert np.flatnonzero(ends).tolist() == [0, 1, 5]


def stepwise(terminals: list[bool], limit: int, *, on_end: bool) -> list[int]:
    """Rows that D4RL's converter keeps, counted one by one as its rule says."""
    kept, count = [], 0
    for row in range(len(terminals) - 1):
        final = count == limit - 1
        if not on_end and final:
            count = 0
            continue
        if terminals[row] or final:
            count = 0
        kept.append(row)
        count += 1
    return kept


@given(st.lists(st.booleans(), min_size=2, max_size=80), st.integers(2, 12), st.booleans())
def test_counted_conversion_follows_the_rule_step_by_step(terminals: list[bool], limit: int, on_end: bool) -> None:
    rows = np.arange(len(terminals), dtype=np.float32)
    data = convert(
        rows[:, None], rows[:, None], rows, np.array(terminals), max_episode_steps=limit, terminate_on_end=on_end
    )
    assert data["rewards"].astype(int).tolist() == stepwise(terminals, limit, on_end=on_end)


def test_file_comes_back_with_its_facts(tmp_path: Path) -> None:
    data = Transitions.from_arrays(**arrays())
    data.save(tmp_path / "data.npz", {"seed": 3})
    loaded, meta = Transitions.load(tmp_path / "data.npz")
    assert meta == {"seed": 3}
    assert loaded.fingerprint == data.fingerprint
    np.testing.assert_array_equal(loaded.packed(), data.packed())


def test_fingerprint_changes_with_a_reward() -> None:
    changed = arrays()["rewards"] + np.eye(6)[3]
    first, second = Transitions.from_arrays(**arrays()), Transitions.from_arrays(**arrays(rewards=changed))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot read transitions from"):
        Transitions.load(tmp_path / "data.npz")


def test_missing_array_is_named(tmp_path: Path) -> None:
    given = arrays()
    given["reward"] = given.pop("rewards")
    np.savez(tmp_path / "data.npz", **given)
    with pytest.raises(UserError, match="no array 'rewards': did you mean reward"):
        Transitions.load(tmp_path / "data.npz")


def test_packed_matrix_holds_all_columns() -> None:
    data = Transitions.from_arrays(**arrays(terminals=np.array([0, 1, 0, 0, 0, 0])))
    packed = data.packed()
    assert packed.shape == (6, 3 + 3 + 2 + 1 + 1)
    np.testing.assert_array_equal(packed[:, -1], [1, 0, 1, 1, 1, 1])


def test_dict_observations_are_refused_with_their_keys() -> None:
    given = arrays(observations={"place": np.zeros((6, 2)), "goal": np.zeros((6, 2))})
    with pytest.raises(UserError, match="observations are a Dict of place, goal: choose the keys"):
        inspect.unwrap(Transitions.from_arrays)(Transitions, **given)  # without the checks of types in tests


def test_larger_actions_need_their_bound() -> None:
    given = arrays(actions=np.full((6, 2), 2.0))
    with pytest.raises(UserError, match=r"actions reach 2, outside \[-1, 1\], in row 0: .* give max_action=2"):
        Transitions.from_arrays(**given)
    assert Transitions.from_arrays(**given, max_action=2.0).summary().max_action == 2.0


def test_steps_that_are_all_timeouts_leave_nothing() -> None:
    with pytest.raises(UserError, match="no transition is left"):
        Transitions.from_arrays(**arrays(next_observations=None, timeouts=np.ones(6)))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_successors_come_back_though_each_state_is_kept_once(rows: list[tuple[bool, bool]]) -> None:
    states = np.random.default_rng(0).standard_normal((len(rows) + 1, 2)).astype(np.float32)
    following, (jump, terminal) = states[1:].copy(), np.array(rows).T
    following[jump] += 1
    zeros = np.zeros((len(rows), 1))
    data = Transitions.from_arrays(states[:-1], zeros, zeros, following, terminal)
    assert len(data.jump_rows) == jump[:-1].sum() + 1
    np.testing.assert_array_equal(data.next_observations, following)
    np.testing.assert_array_equal(data.packed()[:, 2:4], following)
    np.testing.assert_array_equal(data.ends, episode_ends(data.observations, following, data.terminals))


def test_summary_tells_episodes_and_their_ends() -> None:
    given = arrays(rewards=[1, 1, 2, 5, 0, 0], terminals=[0, 1, 0, 0, 0, 0], timeouts=[0, 0, 0, 1, 0, 0])
    summary = Transitions.from_arrays(**given).summary()
    assert (summary.rows, summary.episodes, summary.observation_width, summary.action_width) == (6, 3, 3, 2)
    assert summary.returns == {"min": 0, "25%": 1, "median": 2, "75%": 4.5, "max": 7, "mean": 3}
    assert [summary.lengths[key] for key in ("min", "max")] == [2, 2]
    assert summary.truncated_fraction == pytest.approx(2 / 3)
    assert summary.terminal_fraction == pytest.approx(1 / 6)


def test_chosen_rows_keep_their_successors_and_cut_the_episodes_that_lose_rows() -> None:
    whole = Transitions.from_arrays(
        np.arange(6.0)[:, None], np.zeros((6, 1)), np.arange(6.0), np.arange(1.0, 7.0)[:, None], np.arange(6) == 3
    )
    part = whole.rows(np.array([0, 1, 3, 5]))
    assert part.observations[:, 0].tolist() == [0, 1, 3, 5]
    assert part.next_observations[:, 0].tolist() == [1, 2, 4, 6]
    assert part.ends.tolist() == [False, True, True, True]
    assert part.terminals.tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="no transition is left"):
        whole.rows(np.array([], np.int64))


def test_a_file_that_is_no_npz_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "hello.npz").write_text("hello")
    with pytest.raises(UserError, match=r"it is no whole \.npz file; give one"):
        Transitions.load(tmp_path / "hello.npz")
