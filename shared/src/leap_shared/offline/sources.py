"""Transitions from wherever they are: files by path or name, d3rlpy's data sets, environments that bring their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline.d4rl import from_steps, read_d4rl
from leap_shared.offline.minari import minari_ids, read_minari
from leap_shared.offline.scores import reference, tasks
from leap_shared.offline.transitions import Transitions, checked

__all__ = ["from_d3rlpy", "from_env", "load"]

HDF5 = (".hdf5", ".h5", ".hdf")


def load(name_or_path: Path | str, root: Path | str | None = None, **options: Any) -> Transitions:
    """Transitions of a D4RL task or file, a Minari data set or folder, or an .npz file of :meth:`Transitions.save`.

    Args:
        name_or_path: "hopper-medium-replay-v2", "mujoco/hopper/expert-v0", or the path of a file or folder.
        root: folder with D4RL's files (None: the environment variable D4RL_DATASET_DIR, or else ~/.d4rl/datasets), or
            with Minari's (None: see :func:`read_minari`).
        options: for :func:`read_d4rl`, :func:`read_minari` or :meth:`Transitions.load`.

    Raises:
        UserError: nothing has that name (near ones are named), or the file is refused.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir() or path.name == "main_data.hdf5":
        return read_minari(path, root, **options)
    if path.suffix == ".npz":
        return Transitions.load(path, **options)[0]
    if path.suffix in HDF5:
        return read_d4rl(path, **options)
    if name in tasks():
        return read_d4rl(_task_file(name, root), **{"task": name, **options})
    known = minari_ids(root)
    if name in {part for entry in known for part in (entry, entry.rpartition("-v")[0])}:
        return read_minari(name, root, **options)
    raise UserError(f"{name!r} is neither a file nor a known data set: {did_you_mean(name, [*tasks(), *known])}")


def _task_file(task: str, root: Path | str | None) -> Path:
    """The file of a task, under D4RL's name or the task's own."""
    folder = Path(root or os.environ.get("D4RL_DATASET_DIR") or Path("~", ".d4rl", "datasets")).expanduser()
    names = (reference(task).file, f"{task}.hdf5")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {' or '.join(names)}, the data of {task}: put it there, or give another root")


def from_d3rlpy(dataset: Any, *, max_action: float = 1.0) -> Transitions:
    """Transitions of d3rlpy's MDPDataset, ReplayBuffer or anything with such `episodes`.

    d3rlpy keeps no state after the last step of an episode: where that step is no termination it is left out, as in
    d3rlpy's own batches.

    Raises:
        UserError: it has no episodes, or observations or actions that are not vectors; the message names the episode.
    """
    episodes = getattr(dataset, "episodes", None)
    if not episodes:
        raise UserError(f"{type(dataset).__name__} has no episodes: expected d3rlpy's MDPDataset or ReplayBuffer")
    parts: dict[str, list[Any]] = {key: [] for key in ("observations", "actions", "rewards", "next_observations")}
    ends, terminated = [], []
    for number, episode in enumerate(episodes):
        states = episode.observations
        if not isinstance(states, np.ndarray) or states.ndim != 2:
            given = f"shape {states.shape}" if isinstance(states, np.ndarray) else f"a {type(states).__name__}"
            raise UserError(f"episode {number} has observations of {given}, expected one (steps, width) array")
        rows = len(states) if episode.terminated else len(states) - 1
        if rows:
            columns = (states[:rows], episode.actions[:rows], episode.rewards[:rows])
            following = np.concatenate([states[1:], states[-1:]])[:rows]
            for key, values in zip(parts, (*columns, following), strict=True):
                parts[key].append(values)
            ends.append(rows)
            terminated.append(bool(episode.terminated))
    if not ends:
        raise UserError("no transition is left: each episode is one step that is no termination")
    arrays: dict[str, Any] = {key: np.concatenate(values) for key, values in parts.items()}
    last = np.cumsum(ends) - 1
    for key, flags in (("terminals", terminated), ("timeouts", np.logical_not(terminated))):
        arrays[key] = np.zeros(len(arrays["rewards"]), bool)
        arrays[key][last] = flags
    return Transitions.from_checked(checked(arrays, max_action))


def from_env(environment: Any, **options: Any) -> Transitions:
    """Transitions of an environment with D4RL's `get_dataset()`; d4rl itself is not needed.

    The time limit is the environment's `_max_episode_steps` or its spec's, the task its spec's id if D4RL has it.

    Args:
        environment: the object.
        options: for :func:`from_steps`; they go before what the environment says.

    Raises:
        UserError: it has no `get_dataset`, or :func:`from_steps` refuses the data.
    """
    if not callable(getattr(environment, "get_dataset", None)):
        raise UserError(f"{type(environment).__name__} has no get_dataset(): use read_d4rl or from_arrays")
    spec = getattr(environment, "spec", None)
    known = {
        "task": name if (name := getattr(spec, "id", None)) in tasks() else None,
        "max_episode_steps": getattr(environment, "_max_episode_steps", None)
        or getattr(spec, "max_episode_steps", None),
    }
    return from_steps(environment.get_dataset(), **{**known, **options})
