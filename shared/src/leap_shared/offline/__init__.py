"""Offline reinforcement learning: transitions and their files, returns, the PointMaze generator and simulation."""

from __future__ import annotations

from leap_shared.offline.d4rl import from_steps, read_d4rl, write_d4rl
from leap_shared.offline.minari import minari_ids, read_minari, write_minari
from leap_shared.offline.point_maze import Evaluation, PointMaze, evaluate, generate
from leap_shared.offline.returns import (
    StateNormalisation,
    discounted_return_to_go,
    episode_returns,
    n_step,
    state_normalisation,
)
from leap_shared.offline.scores import (
    Reference,
    Score,
    labelled_score,
    normalised_score,
    reference,
    tasks,
    tasks_of_file,
)
from leap_shared.offline.sources import from_d3rlpy, from_env, load
from leap_shared.offline.transitions import Summary, Transitions, convert, episode_ends

__all__ = [
    "Evaluation",
    "PointMaze",
    "Reference",
    "Score",
    "StateNormalisation",
    "Summary",
    "Transitions",
    "convert",
    "discounted_return_to_go",
    "episode_ends",
    "episode_returns",
    "evaluate",
    "from_d3rlpy",
    "from_env",
    "from_steps",
    "generate",
    "labelled_score",
    "load",
    "minari_ids",
    "n_step",
    "normalised_score",
    "read_d4rl",
    "read_minari",
    "reference",
    "state_normalisation",
    "tasks",
    "tasks_of_file",
    "write_d4rl",
    "write_minari",
]
