"""Small choices of a training by name: which rows, which priorities, which rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_oper.priorities import Priorities, top_rows
from leap_shared.errors import UserError
from leap_shared.offline import Transitions, episode_returns
from leap_shared.offline.algorithms.cql import cql_antmaze_rewards
from leap_shared.offline.algorithms.iql import antmaze_rewards, locomotion_rewards
from leap_shared.offline.rows import Rewards
from leap_shared.offline.scores import reference

__all__ = ["REWARDS", "chosen_rows", "preset", "priorities"]

REWARDS: Mapping[str, Rewards | None] = {
    "recorded": None,
    "locomotion": locomotion_rewards,
    "antmaze": antmaze_rewards,
    "antmaze-cql": cql_antmaze_rewards,
}


def chosen_rows(dataset: Transitions, top: float | None) -> Transitions:
    """The rows of the best `top` percent of returns (counted over rows), or all."""
    if top is None:
        return dataset
    return dataset.rows(top_rows(episode_returns(dataset.rewards, dataset.ends), top))


def preset(config: Any, task: str | None) -> dict[str, Any]:
    """What the authors set for a D4RL task, where it differs from the defaults.

    Raises:
        UserError: the task is unknown, or the algorithm has no values by task.
    """
    if task is None:
        return {}
    reference(task)
    if not hasattr(config, "of_task"):
        raise UserError(f"{config.__name__} has no values by task: leave preset out")
    found, default = config.of_task(task), config()
    fields = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(found, name) for name in fields if getattr(found, name) != getattr(default, name)}


def priorities(
    path: Path | None, dataset: Transitions, iteration: int | None, std: float | None, eps: float
) -> Priorities | None:
    """Weights from a file, brought to one number per row: an iteration, the mean over seeds, a deviation."""
    if path is None:
        return None
    found = Priorities.load(path, dataset, iteration)
    if found.weights.ndim == 3:
        found = found.at(iteration or found.weights.shape[1])
    if found.weights.ndim == 2:
        found = found.ensemble("mean")
    return found if std is None else found.rescale(std=std, eps=eps)
