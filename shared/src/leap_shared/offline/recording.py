"""Steps of several environments side by side, recorded into one file-backed matrix that outlives a killed process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray

from leap_shared.errors import UserError
from leap_shared.offline.online import Experience
from leap_shared.offline.simulation import make_environment

__all__ = ["Recording", "derived_seed", "described"]

log = logging.getLogger(__name__)


def derived_seed(seed: int, *path: int) -> int:
    """Seed for one of a tree of uses, as `numpy.random.SeedSequence` mixes it."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0])


def described(name: str, options: Mapping[str, Any]) -> tuple[int, int, Any]:
    """Widths of the observations and the actions of an environment, and its gymnasium spec.

    Raises:
        UserError: `make_environment` refuses it, or its actions have no bounds.
    """
    environment = make_environment(name, **options)
    try:
        space = environment.action_space
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise UserError(f"{name} has actions without bounds ({space}): wrap it so that they are bounded")
        return environment.observation_space.shape[0], space.shape[0], environment.spec
    finally:
        environment.close()


class Recording:
    """`num_envs` environments and every step of theirs; actions in [-1, 1] are brought to the environments' ranges.

    Each episode starts from a seed of its own. A restored recording steps the running episodes again from their starts
    with the recorded actions, which gives the very state back in every environment whose randomness comes from its
    seed. An environment that does not come back to the recorded observation is cut there and starts a new episode;
    a warning says so.

    Args:
        path: of the matrix of `capacity` rows; what a former process wrote there is kept for `load_state_dict`.
        name: of the gymnasium environment.
        num_envs: environments.
        capacity: steps of all environments together, rounded up to whole rounds.
        seed: of the episodes.
        options: of `make_environment`.

    Raises:
        UserError: the environment is refused, or the disk has no room.
    """

    def __init__(
        self, path: Path, name: str, num_envs: int, capacity: int, seed: int, options: Mapping[str, Any]
    ) -> None:
        self.observation, self.action, _ = described(name, options)
        import gymnasium

        mode = gymnasium.vector.AutoresetMode.DISABLED
        make: Callable[[], Any] = partial(make_environment, name, **options)
        self._environments: Any = gymnasium.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)
        self._single: list[Any] = [environment.unwrapped for environment in self._environments.envs]
        space: Any = self._environments.single_action_space
        self._low, self._high, self._half_range = space.low, space.high, (space.high - space.low) / 2
        self.num_envs, self.seed, self.rounds = num_envs, seed, 0
        self._numbers, self._starts = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        shapes = [getattr(getattr(self._single[0], "data", None), part, np.empty(0)).size for part in ("qpos", "qvel")]
        self._columns = _columns(self.observation, self.action, *shapes)
        width = max(columns.stop for columns in self._columns.values())
        self._file = _opened(path, -(-capacity // num_envs) * num_envs, width)
        self._matrix = np.asarray(self._file)
        self._learned = torch.from_numpy(self._matrix[:, : self._columns["next_observations"].stop])
        self.observations = self._reset(np.ones(num_envs, bool))

    def __len__(self) -> int:
        return self.rounds * self.num_envs

    def close(self) -> None:
        """Close the environments."""
        self._environments.close()

    def step(self, actions: Float32[np.ndarray, "envs action"], log_probs: Float32[np.ndarray, " envs"]) -> None:
        """One step of every environment; finished ones start anew."""
        rows = self._matrix[len(self) : len(self) + self.num_envs]
        columns = self._columns
        rows[:, columns["observations"]] = self.observations
        rows[:, columns["actions"]] = actions
        for row, single in zip(rows, self._single, strict=True):
            for part in ("qpos", "qvel"):
                if columns[part].stop > columns[part].start:
                    row[columns[part]] = getattr(single.data, part).ravel().view(np.float32)
        states, rewards, terminals, truncations, _ = self._environments.step(self._scaled(actions))
        self.observations = states.astype(np.float32)
        rows[:, columns["next_observations"]] = self.observations
        for name, values in (("rewards", rewards), ("not_terminal", ~terminals), ("truncated", truncations)):
            rows[:, columns[name].start] = values
        rows[:, columns["log_probs"].start] = log_probs
        self.rounds += 1
        if (ended := terminals | truncations).any():
            self._numbers[ended] += 1
            self._starts[ended] = self.rounds
            self.observations = self._reset(ended)

    def drawn(self, updates: int, batch_size: int, generator: torch.Generator) -> list[Experience]:
        """Batches of rows recorded so far, drawn with replacement by one gather."""
        indices = torch.randint(len(self), (updates * batch_size,), generator=generator)
        rows = self._learned.index_select(0, indices).view(updates, batch_size, -1)
        names = ("observations", "actions", "rewards", "not_terminal", "next_observations")
        observations, actions, rewards, kept, following = (rows[..., self._columns[name]] for name in names)
        parts = observations, actions, rewards[..., 0], kept[..., 0], following
        return [Experience(*batch) for batch in zip(*(part.unbind() for part in parts), strict=True)]

    def arrays(
        self, steps: int | None = None, *, limit: int | None = None, whole: bool = False
    ) -> dict[str, NDArray[Any]]:
        """The steps in D4RL's keys, episode after episode in the order of their starts.

        A row that ends an episode at the time limit, or with the recording, is a timeout; the time limit counts even
        where the row is terminal.

        Args:
            steps: the first ones, of all environments together; None is all.
            limit: the most rows to return.
            whole: leave out what follows the last complete episode of each environment.
        """
        count = len(self) if steps is None else steps
        rows = self._matrix[:count].reshape(-1, self.num_envs, self._matrix.shape[1])
        terminals, truncated = (
            rows[..., self._columns[name].start] == value for name, value in (("not_terminal", 0), ("truncated", 1))
        )
        last = terminals | truncated
        times, numbers = np.indices(last.shape)
        begins = np.concatenate([np.ones((1, self.num_envs), bool), last[:-1]])
        starts = np.maximum.accumulate(np.where(begins, times, 0), axis=0)
        order = np.lexsort((times.ravel(), numbers.ravel(), starts.ravel()))
        if whole:
            complete = times <= np.where(last, times, -1).max(axis=0)
            order = order[complete.ravel()[order]]
        order = order[:limit]
        stops = (times == len(rows) - 1).ravel()[order]
        stops[-1:] = True
        matrix, ends = self._matrix[:count][order], terminals.ravel()[order]
        parts = {name: matrix[:, where] for name, where in self._columns.items()}
        arrays = {name: parts[name] for name in ("observations", "actions", "next_observations")}
        arrays |= {"rewards": parts["rewards"][:, 0], "terminals": ends}
        arrays["timeouts"] = truncated.ravel()[order] | (stops & ~ends)
        if not np.isnan(parts["log_probs"]).any():
            arrays["infos/action_log_probs"] = parts["log_probs"][:, 0]
        positions = {name: np.ascontiguousarray(parts[name]).view(np.float64) for name in ("qpos", "qvel")}
        return arrays | {f"infos/{name}": values for name, values in positions.items() if values.shape[1]}

    def state_dict(self) -> dict[str, Any]:
        """Counters; the rows themselves are brought to the disk first."""
        self._file.flush()
        return {"rounds": self.rounds, "numbers": self._numbers.copy(), "starts": self._starts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken: rows recorded after it are written over."""
        self.rounds = int(state["rounds"])
        self._numbers[:], self._starts[:] = state["numbers"], state["starts"]
        self.observations = self._reset(np.ones(self.num_envs, bool))
        actions, following = self._columns["actions"], self._columns["next_observations"]
        lost = np.zeros(self.num_envs, bool)
        for number, environment in enumerate(self._environments.envs):
            rows = self._matrix[self._starts[number] * self.num_envs + number : len(self) : self.num_envs]
            for row in rows:
                self.observations[number] = environment.step(self._scaled(row[actions]))[0]
            if len(rows) and not np.array_equal(self.observations[number], rows[-1, following]):
                lost[number] = True
                rows[-1, self._columns["truncated"].start] = 1
        if lost.any():
            log.warning("%d of %d environments cannot be brought back: their episodes end here", lost.sum(), lost.size)
            self._numbers[lost] += 1
            self._starts[lost] = self.rounds
            self.observations[lost] = self._reset(lost)[lost]

    def _scaled(self, actions: NDArray[np.float32]) -> NDArray[Any]:
        scaled = self._low + (actions + 1) * self._half_range
        bounded: NDArray[Any] = scaled.clip(self._low, self._high).astype(self._low.dtype)
        return bounded

    def _reset(self, chosen: NDArray[np.bool_]) -> Float32[np.ndarray, "envs observation"]:
        numbers = self._numbers.tolist()
        seeds = [derived_seed(self.seed, index, number) for index, number in enumerate(numbers)]
        states, _ = self._environments.reset(seed=seeds, options={"reset_mask": chosen})
        observations: NDArray[np.float32] = states.astype(np.float32)
        return observations


def _columns(observation: int, action: int, positions: int, velocities: int) -> dict[str, slice]:
    """Where each quantity stands in a row of float32; qpos and qvel are float64 and take two columns a number.

    What a learner needs comes first.
    """
    widths = {"observations": observation, "actions": action, "rewards": 1, "not_terminal": 1}
    widths |= {"next_observations": observation, "truncated": 1, "log_probs": 1}
    widths |= {"qpos": 2 * positions, "qvel": 2 * velocities}
    stops = np.cumsum(list(widths.values())).tolist()
    return {name: slice(stop - width, stop) for stop, (name, width) in zip(stops, widths.items(), strict=True)}


def _opened(path: Path, rows: int, width: int) -> np.memmap[Any, np.dtype[np.float32]]:
    """Writable matrix in the file at `path`, which is made or brought to that size; its content stays."""
    try:
        with path.open("r+b" if path.exists() else "w+b") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash in the middle of a step else
                os.posix_fallocate(file.fileno(), 0, rows * width * 4)
            file.truncate(max(rows * width * 4, path.stat().st_size))
        return np.memmap(path, np.float32, "r+", shape=(rows, width))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Free some space or give another folder") from error
