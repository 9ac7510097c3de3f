"""Offline reinforcement learning: transitions, returns, the PointMaze generator and evaluation in simulation."""

from __future__ import annotations

from leap_shared.offline.point_maze import Evaluation, PointMaze, evaluate, generate
from leap_shared.offline.returns import (
    StateNormalisation,
    discounted_return_to_go,
    episode_returns,
    n_step,
    state_normalisation,
)
from leap_shared.offline.transitions import Transitions, convert, episode_ends

__all__ = [
    "Evaluation",
    "PointMaze",
    "StateNormalisation",
    "Transitions",
    "convert",
    "discounted_return_to_go",
    "episode_ends",
    "episode_returns",
    "evaluate",
    "generate",
    "n_step",
    "state_normalisation",
]
