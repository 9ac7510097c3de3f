"""Policies in gymnasium: returns of whole episodes, equal starts, scaled actions, plain refusals."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from leap_shared.errors import UserError
from leap_shared.offline.simulation import make_environment, run_episodes


class Counter(gymnasium.Env[Any, Any]):
    """Pays its action, ends after as many steps as its seed says."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(np.float32([1.0]), np.float32([5.0]))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.length = seed
        self.steps = 0
        return np.array([self.length, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        over = self.steps == self.length
        return np.array([self.length, self.steps], np.float32), float(action[0]), over, False, {}


def constant(*values: float) -> Any:
    return lambda states: np.broadcast_to(np.array(values, np.float32)[:, None, None], (*states.shape[:2], 1))


def test_returns_are_sums_over_each_episode_alone_with_actions_in_the_environments_range() -> None:
    returns = run_episodes(constant(-1.0, 0.0, 1.0), Counter, runs=3, episodes=2, seed=3)
    np.testing.assert_allclose(returns, [[3, 4], [9, 12], [15, 20]])


def test_every_run_starts_from_the_same_states() -> None:
    seen: list[Any] = []

    def act(states: Any) -> Any:
        seen.append(states.copy())
        return np.zeros((*states.shape[:2], 1), np.float32)

    run_episodes(act, Counter, runs=2, episodes=3, seed=1)
    np.testing.assert_array_equal(seen[0][0], seen[0][1])
    assert seen[0][0, :, 0].tolist() == [1, 2, 3]


def test_dict_observations_are_joined_in_the_chosen_order() -> None:
    environment = make_environment("PointMaze_UMaze-v3", ("observation", "desired_goal"))
    state, _ = environment.reset(seed=0)
    assert state.shape == environment.observation_space.shape == (6,)
    np.testing.assert_array_equal(state[4:], environment.unwrapped.goal)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("Hoper-v5", (), "did you mean Hopper-v"),
        ("Hopper-v99", (), "cannot be made"),
        ("PointMaze_UMaze-v3", (), "keys achieved_goal, desired_goal, observation: choose"),
        ("PointMaze_UMaze-v3", ("goal",), "choose which are joined"),
        ("CartPole-v1", (), "only vectors of real numbers"),
    ],
)
def test_environments_that_cannot_serve_are_refused(name: str, keys: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_environment(name, keys)


def test_no_episodes_are_refused() -> None:
    with pytest.raises(UserError, match="episodes=0: give at least one"):
        run_episodes(constant(0.0), Counter, runs=1, episodes=0)
