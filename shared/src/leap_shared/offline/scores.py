"""D4RL's tasks: the reference scores that returns are normalised with, the time limits and the files."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from leap_shared.errors import UserError, did_you_mean

__all__ = ["Reference", "Score", "labelled_score", "normalised_score", "reference", "tasks", "tasks_of_file"]

LOCOMOTION = re.compile(r"(hopper|halfcheetah|walker2d|ant)-v(\d+)")


@dataclass(frozen=True)
class Reference:
    """One task of D4RL 1.1; None where D4RL states nothing."""

    task: str
    suite: str
    max_episode_steps: int | None
    min_score: float | None
    """Return of the random policy: 0 when normalised."""
    max_score: float | None
    """Return of the expert: 100 when normalised."""
    observation_width: int | None
    action_width: int | None
    file: str
    """Name of the HDF5 file; human and long-horizon tasks share theirs."""


class Score(NamedTuple):
    """Normalised score, and what it may be compared with."""

    score: Float64[np.ndarray, "*shape"]
    label: str


@cache
def _table() -> dict[str, Reference]:
    with files("leap_shared.offline").joinpath("d4rl_scores.csv").open(encoding="utf-8") as file:
        return {row["task"]: _reference(row) for row in csv.DictReader(file)}


def _reference(row: dict[str, str]) -> Reference:
    steps, observation, action = (
        int(row[key]) if row[key] else None for key in ("max_episode_steps", "obs_dim", "action_dim")
    )
    low, high = (float(row[key]) if row[key] else None for key in ("ref_min_score", "ref_max_score"))
    return Reference(row["task"], row["suite"], steps, low, high, observation, action, row["hdf5_file"])


def tasks() -> list[str]:
    """Names of all tasks."""
    return list(_table())


def tasks_of_file(name: str) -> list[Reference]:
    """Tasks whose data a file of this name holds; empty if D4RL has no such file."""
    return [found for found in _table().values() if name in (found.file, f"{found.task}.hdf5")]


def reference(task: str) -> Reference:
    """What D4RL states of a task.

    Raises:
        UserError: there is no such task; the message names near ones.
    """
    if task not in _table():
        raise UserError(f"D4RL has no task {task!r}: {did_you_mean(task, _table())}")
    return _table()[task]


def normalised_score(task: str, returns: float | ArrayLike) -> Float64[np.ndarray, "*shape"]:
    """100 (R - min) / (max - min) of undiscounted returns R, in their shape.

    Raises:
        UserError: there is no such task, or D4RL has no reference scores for it.
    """
    found = reference(task)
    if found.min_score is None or found.max_score is None:
        raise UserError(f"D4RL has no reference scores for {task}: report returns")
    return np.asarray(100 * (np.asarray(returns, np.float64) - found.min_score) / (found.max_score - found.min_score))


def labelled_score(environment: str, returns: float | ArrayLike) -> Score:
    """Normalised score in a task of D4RL, or in a locomotion environment of gymnasium ("Hopper-v5") with D4RL's range.

    Only scores of the same label may stand in one table.

    Raises:
        UserError: it is neither.
    """
    if found := LOCOMOTION.fullmatch(environment.lower()):
        score = normalised_score(f"{found[1]}-medium-v2", returns)
        return Score(score, f"v{found[2]}, D4RL reference range")
    return Score(normalised_score(environment, returns), "D4RL")
