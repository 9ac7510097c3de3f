"""The PointMaze data and evaluation, in real simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leap_shared.errors import UserError
from leap_shared.offline import PointMaze, Transitions, evaluate, generate

SMALL = PointMaze(episodes=4, episode_steps=250, goal_fraction=0.5)


@pytest.fixture(scope="module")
def data() -> Transitions:
    return generate(SMALL, seed=0)


def test_goal_seekers_arrive_and_are_the_given_fraction(data: Transitions) -> None:
    rewards = data.rewards.reshape(4, 250)
    assert (rewards[:, -1] == 1).sum() == 2


def test_episodes_end_by_time_alone(data: Transitions) -> None:
    assert np.flatnonzero(data.ends).tolist() == [249, 499, 749, 999]
    assert not data.terminals.any()


def test_rewards_mark_the_goal(data: Transitions) -> None:
    distance = np.linalg.norm(data.next_observations[:, :2] - SMALL.goal_position, axis=1)
    np.testing.assert_array_equal(data.rewards == 1, distance <= 0.45)


def test_trajectories_stay_off_the_walls(data: Transitions) -> None:
    assert not any(SMALL.walls[SMALL.cell(position)] for position in data.observations[::10, :2])


def test_same_seed_gives_the_same_rows(data: Transitions) -> None:
    np.testing.assert_array_equal(generate(SMALL, seed=0).packed(), data.packed())
    assert not np.array_equal(generate(SMALL, seed=1).packed(), data.packed())


def test_set_is_kept_and_read_again(tmp_path: Path) -> None:
    maze, seen = PointMaze(episodes=2, episode_steps=20), []
    first = generate(maze, 5, tmp_path / "set.npz", seen.append)
    second = generate(maze, 5, tmp_path / "set.npz", seen.append)
    assert seen == [1, 1, 2]
    assert first.fingerprint == second.fingerprint
    with pytest.raises(UserError, match="holds another data set"):
        generate(maze, 6, tmp_path / "set.npz")


def test_policies_are_judged_from_equal_starts() -> None:
    maze = PointMaze(episode_steps=10)

    def still(observations: np.ndarray) -> np.ndarray:
        return np.zeros((len(observations), 2), np.float32)

    first, second = evaluate([still, still], maze, [1, 2, 3])
    np.testing.assert_array_equal(first.paths, second.paths)
    assert first.paths.shape == (3, 11, 2)
    assert first.returns.tolist() == [0.0, 0.0, 0.0]
    assert not np.array_equal(first.paths[0, 0], first.paths[1, 0])


def test_standing_on_the_goal_earns_every_step() -> None:
    maze = PointMaze(episode_steps=10, start=(6, 6))
    (result,) = evaluate([lambda states: np.zeros((len(states), 2), np.float32)], maze, [0])
    assert result.returns.tolist() == [10.0]
    assert result.success.all()


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"episode_steps": 1}, {"goal_fraction": 1.5}, {"noise": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected episodes >= 1"):
        PointMaze(**wrong)


def test_evaluation_needs_an_episode() -> None:
    with pytest.raises(UserError, match="no evaluation episodes"):
        evaluate([], SMALL, [])
