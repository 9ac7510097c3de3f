"""Small data sets for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from leap_shared.offline import Transitions


def walk(episodes: int = 6, length: int = 10, *, seed: int = 0, rewards: Any = None) -> Transitions:
    """Random walks of two coordinates, one action wide, cut by time."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((episodes, length + 1, 2)).cumsum(axis=1)
    timeouts = np.zeros((episodes, length), bool)
    timeouts[:, -1] = True
    if rewards is None:
        rewards = random.standard_normal(episodes * length)
    return Transitions.from_arrays(
        states[:, :-1].reshape(-1, 2),
        random.uniform(-1, 1, (episodes * length, 1)),
        rewards,
        states[:, 1:].reshape(-1, 2),
        np.zeros(episodes * length),
        timeouts.reshape(-1),
    )
