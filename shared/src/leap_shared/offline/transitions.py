"""A fixed set of transitions: checked where it enters, converted from raw steps, kept as one .npz file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import ArrayLike, NDArray

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import atomic_writer

__all__ = ["Transitions", "convert", "episode_ends"]

JUMP = 1e-6
FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


@dataclass(frozen=True, eq=False)
class Transitions:
    """Rows (s, a, r, s', terminal, timeout), episode after episode; made by :meth:`from_arrays`, which checks them.

    `terminals` mark true ends of the task, `timeouts` the rows after which only the time was up.
    """

    observations: Float32[np.ndarray, "rows observation"]
    actions: Float32[np.ndarray, "rows action"]
    rewards: Float32[np.ndarray, " rows"]
    next_observations: Float32[np.ndarray, "rows observation"]
    terminals: Bool[np.ndarray, " rows"]
    timeouts: Bool[np.ndarray, " rows"]

    @classmethod
    def from_arrays(
        cls,
        observations: ArrayLike,
        actions: ArrayLike,
        rewards: ArrayLike,
        next_observations: ArrayLike | None,
        terminals: ArrayLike,
        timeouts: ArrayLike | None = None,
        *,
        max_episode_steps: int | None = None,
    ) -> Transitions:
        """Check arrays and make float32 and bool of them; (rows, 1) is taken for (rows,).

        Where `next_observations` is None the rows are raw steps, which :func:`convert` makes into transitions.

        Raises:
            UserError: lengths or widths disagree, a number is not finite, a flag is neither 0 nor 1, an action is
                outside [-1, 1], or raw steps come with neither `timeouts` nor `max_episode_steps`.
        """
        given = dict(zip(FIELDS, (observations, actions, rewards, next_observations, terminals, timeouts), strict=True))
        arrays = {key: _checked(key, value) for key, value in given.items() if value is not None}
        rows = len(arrays["observations"])
        for key, array in arrays.items():
            if len(array) != rows:
                raise UserError(f"{key} has {len(array)} rows and observations has {rows}: give one row per step")
        if rows < 2:
            raise UserError(f"the data has {rows} rows: at least 2 are needed")
        if (largest := float(np.abs(arrays["actions"]).max(initial=0.0))) > 1 + 1e-5:
            raise UserError(f"actions reach {largest:.4g}, outside [-1, 1]: divide them by the largest action")
        if "next_observations" not in arrays:
            first = arrays["observations"], arrays["actions"], arrays["rewards"], arrays["terminals"]
            arrays = convert(*first, arrays.get("timeouts"), max_episode_steps=max_episode_steps)
            rows = len(arrays["rewards"])
        elif arrays["next_observations"].shape != arrays["observations"].shape:
            shapes = [arrays[key].shape for key in ("next_observations", "observations")]
            raise UserError(f"next_observations {shapes[0]} and observations {shapes[1]} must have one shape")
        return cls(**{"timeouts": np.zeros(rows, bool), **arrays})

    def __len__(self) -> int:
        return len(self.rewards)

    @cached_property
    def ends(self) -> Bool[np.ndarray, " rows"]:
        """Last rows of episodes: where :func:`episode_ends` or `timeouts` say so."""
        ends: NDArray[np.bool_] = np.logical_or(
            episode_ends(self.observations, self.next_observations, self.terminals), self.timeouts
        )
        return ends

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the number of rows, the first and the last row and the sum of rewards: ties weights to data."""
        rows = [getattr(self, key)[[0, -1]].tobytes() for key in FIELDS[:5]]
        total = np.float64(self.rewards.sum(dtype=np.float64))
        return hashlib.sha256(b"".join([str(len(self)).encode(), *rows, f"{total:.9g}".encode()])).hexdigest()

    def packed(self) -> Float32[np.ndarray, "rows width"]:
        """One matrix [s, s', a, r, 1 - terminal], so that a batch is one gather."""
        columns = (self.observations, self.next_observations, self.actions, self.rewards[:, None])
        return np.concatenate([*columns, 1.0 - self.terminals[:, None].astype(np.float32)], axis=1)

    def save(self, path: Path, meta: Mapping[str, Any] | None = None) -> None:
        """Write an .npz file, atomically, with `meta` (JSON values) beside the arrays."""
        arrays = {key: getattr(self, key) for key in FIELDS}
        with atomic_writer(path) as file:
            np.savez(file, meta=np.array(json.dumps(dict(meta or {}))), **arrays)

    @classmethod
    def load(cls, path: Path) -> tuple[Transitions, dict[str, Any]]:
        """Data and `meta` of an .npz file with the arrays of this class; `timeouts` and `meta` may be absent.

        Raises:
            UserError: the file cannot be read, an array is missing, or :meth:`from_arrays` refuses one.
        """
        try:
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = json.loads(str(arrays.pop("meta", "{}")))
        except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read transitions from {path}: {error}") from error
        for key in FIELDS[:5]:
            if key not in arrays:
                raise UserError(f"{path} has no array {key!r}: {did_you_mean(key, arrays)}")
        try:
            return cls.from_arrays(**{key: arrays[key] for key in FIELDS if key in arrays}), meta
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _checked(key: str, value: ArrayLike) -> NDArray[Any]:
    """One array as float32 or bool, with one dimension or two."""
    array = np.asarray(value)
    wide = key in ("observations", "actions", "next_observations")
    if not wide and array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 + wide:
        raise UserError(
            f"{key} has shape {array.shape}, expected {'(rows, width)' if wide else '(rows,) or (rows, 1)'}"
        )
    if array.dtype.kind not in "fiub":
        raise UserError(f"{key} holds {array.dtype}, expected numbers (of Dict observations choose the keys first)")
    if key in ("terminals", "timeouts"):
        if not np.isin(array, (0, 1)).all():
            raise UserError(f"{key} must be 0 or 1, row {int(np.argmin(np.isin(array, (0, 1))))} is neither")
        return array.astype(bool)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise UserError(f"{key} is NaN or infinite in float32 at row {row}: repair or drop that episode")
    return array


def episode_ends(
    observations: Float32[np.ndarray, "rows observation"],
    next_observations: Float32[np.ndarray, "rows observation"],
    terminals: Bool[np.ndarray, " rows"],
) -> Bool[np.ndarray, " rows"]:
    """Rows whose successor is not where the next row starts (further than 1e-6), terminal rows, and the last row."""
    jump = np.linalg.norm(observations[1:] - next_observations[:-1], axis=1) > JUMP
    ends: NDArray[np.bool_] = np.append(jump, True) | terminals
    return ends


def convert(
    observations: Float32[np.ndarray, "steps observation"],
    actions: Float32[np.ndarray, "steps action"],
    rewards: Float32[np.ndarray, " steps"],
    terminals: Bool[np.ndarray, " steps"],
    timeouts: Bool[np.ndarray, " steps"] | None = None,
    *,
    max_episode_steps: int | None = None,
    terminate_on_end: bool = False,
) -> dict[str, NDArray[Any]]:
    """Raw steps to the arrays of :class:`Transitions`, row for row as D4RL's q-learning converter makes them.

    The last raw step is lost, and so (unless `terminate_on_end`) is each step at which time was up, whose successor is
    unknown. Without `timeouts` the steps are counted; as in D4RL the count starts at 1, not 0, after a terminal.
    Takes O(steps) array work and, without `timeouts`, a loop over episodes.

    Raises:
        UserError: there are neither `timeouts` nor a `max_episode_steps` above 1.
    """
    if timeouts is not None:
        final = timeouts[:-1]
    elif max_episode_steps is not None and max_episode_steps > 1:
        final = _counted_timeouts(terminals[:-1], max_episode_steps, counted=terminate_on_end)
    else:
        raise UserError("the data has no timeouts: give max_episode_steps (above 1) to split it into episodes")
    keep = np.ones(len(final), bool) if terminate_on_end else ~final
    return {
        "observations": observations[:-1][keep],
        "actions": actions[:-1][keep],
        "rewards": rewards[:-1][keep],
        "next_observations": observations[1:][keep],
        "terminals": terminals[:-1][keep],
    }


def _counted_timeouts(terminals: NDArray[np.bool_], max_episode_steps: int, *, counted: bool) -> NDArray[np.bool_]:
    """Steps whose count is `max_episode_steps` - 1; `counted` says whether such a step counts for the next episode."""
    final = np.zeros(len(terminals), bool)
    stops = np.flatnonzero(terminals)
    row, count, stop = 0, 0, 0
    while (cut := row + max_episode_steps - 1 - count) < len(final):
        while stop < len(stops) and stops[stop] < row:
            stop += 1
        if stop < len(stops) and stops[stop] < cut:
            row, count = int(stops[stop]) + 1, 1
        else:
            final[cut] = True
            row, count = cut + 1, int(counted)
    return final
