"""A fixed set of transitions: checked where it enters, converted from raw steps, kept as one .npz file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy.typing import ArrayLike, NDArray

from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import atomic_writer
from leap_shared.offline.returns import episode_returns

__all__ = ["Summary", "Transitions", "checked", "convert", "counted_timeouts", "different_rows", "episode_ends"]

JUMP = 1e-6
FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


@dataclass(frozen=True)
class Summary:
    """Size and quality of a data set; `returns` and `lengths` give min, 25%, median, 75%, max and mean of episodes."""

    rows: int
    episodes: int
    observation_width: int
    action_width: int
    returns: dict[str, float]
    lengths: dict[str, float]
    truncated_fraction: float
    """Part of the episodes that end otherwise than by a terminal."""
    terminal_fraction: float
    """Part of the rows that are terminal."""
    max_action: float
    """Largest absolute value of an action."""
    megabytes: float
    """Memory that the rows take."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """Rows (s, a, r, s', terminal, timeout), episode after episode; made by :meth:`from_arrays`, which checks them.

    `terminals` mark true ends of the task, `timeouts` the rows after which only the time was up. Each state is kept
    once: the successor of a row is the next row's observation, except in the rows `jump_rows` (the last is always one).
    """

    observations: Float32[np.ndarray, "rows observation"]
    actions: Float32[np.ndarray, "rows action"]
    rewards: Float32[np.ndarray, " rows"]
    terminals: Bool[np.ndarray, " rows"]
    timeouts: Bool[np.ndarray, " rows"]
    jump_rows: Int64[np.ndarray, " jumps"]
    """Rows whose successor is not the next row's observation, in order."""
    jump_observations: Float32[np.ndarray, "jumps observation"]
    """The successors of those rows."""

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
        max_action: float = 1.0,
    ) -> Transitions:
        """Check arrays and make float32 and bool of them; (rows, 1) is taken for (rows,).

        Where `next_observations` is None the rows are raw steps, which :func:`convert` makes into transitions.

        Raises:
            UserError: lengths or widths disagree, a number is not finite, a flag is neither 0 nor 1, an action is
                outside [-`max_action`, `max_action`], or raw steps come with neither `timeouts` nor
                `max_episode_steps`.
        """
        given = dict(zip(FIELDS, (observations, actions, rewards, next_observations, terminals, timeouts), strict=True))
        arrays = checked({key: value for key, value in given.items() if value is not None}, max_action)
        if "next_observations" not in arrays:
            first = arrays["observations"], arrays["actions"], arrays["rewards"], arrays["terminals"]
            arrays = convert(*first, arrays.get("timeouts"), max_episode_steps=max_episode_steps)
        return cls.from_checked(arrays)

    @classmethod
    def from_checked(cls, arrays: Mapping[str, NDArray[Any]]) -> Transitions:
        """Transitions of arrays that :func:`checked` or :func:`convert` gave, each with its successor.

        Raises:
            UserError: there are no rows.
        """
        arrays = dict(arrays)
        if not len(arrays["rewards"]):
            raise UserError("no transition is left: each step is the last of its episode")
        arrays.setdefault("timeouts", np.zeros(len(arrays["rewards"]), bool))
        following = arrays.pop("next_observations")
        jumps = different_rows(arrays["observations"], following)
        return cls(**arrays, jump_rows=jumps, jump_observations=following[jumps])

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def next_observations(self) -> Float32[np.ndarray, "rows observation"]:
        """Successor of every row: a new array at each access, so keep it where it is needed twice."""
        following = np.empty_like(self.observations)
        self._write_successors(following)
        return following

    def _write_successors(self, out: NDArray[np.float32]) -> None:
        out[:-1] = self.observations[1:]
        out[self.jump_rows] = self.jump_observations

    @cached_property
    def ends(self) -> Bool[np.ndarray, " rows"]:
        """Last rows of episodes: where :func:`episode_ends` or `timeouts` say so."""
        ends: NDArray[np.bool_] = np.logical_or(self.terminals, self.timeouts)
        resumed = self.observations[np.minimum(self.jump_rows + 1, len(self) - 1)]
        ends[self.jump_rows[_apart(resumed, self.jump_observations)]] = True
        ends[-1] = True
        return ends

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the number of rows, the first and the last row and the sum of rewards: ties weights to data."""
        second = self.jump_observations[0] if self.jump_rows[0] == 0 else self.observations[1]
        outer = {"next_observations": np.stack([second, self.jump_observations[-1]])}
        rows = [(outer[key] if key in outer else getattr(self, key)[[0, -1]]).tobytes() for key in FIELDS[:5]]
        total = np.float64(self.rewards.sum(dtype=np.float64))
        return hashlib.sha256(b"".join([str(len(self)).encode(), *rows, f"{total:.9g}".encode()])).hexdigest()

    def packed(self) -> Float32[np.ndarray, "rows width"]:
        """One matrix [s, s', a, r, 1 - terminal], so that a batch is one gather."""
        width, actions = self.observations.shape[1], self.actions.shape[1]
        matrix = np.empty((len(self), 2 * width + actions + 2), np.float32)
        matrix[:, :width] = self.observations
        self._write_successors(matrix[:, width : 2 * width])
        matrix[:, 2 * width : -2] = self.actions
        matrix[:, -2] = self.rewards
        np.subtract(1.0, self.terminals, out=matrix[:, -1], casting="same_kind")
        return matrix

    def rows(self, indices: Int64[np.ndarray, " chosen"]) -> Transitions:
        """Some of the rows, in order; an episode that loses rows is cut there.

        Raises:
            UserError: there are none.
        """
        chosen = {key: getattr(self, key)[indices] for key in ("observations", "actions", "rewards", "terminals")}
        cut = np.append(np.diff(indices) != 1, True)[: len(indices)] & ~chosen["terminals"]
        timeouts = self.timeouts[indices] | cut
        return self.from_checked({**chosen, "timeouts": timeouts, "next_observations": self.next_observations[indices]})

    def summary(self) -> Summary:
        """What the data holds, for a look before work starts."""
        last = np.flatnonzero(self.ends)
        returns = episode_returns(self.rewards, self.ends)[last]
        lengths = np.diff(last, prepend=-1)
        return Summary(
            rows=len(self),
            episodes=len(last),
            observation_width=self.observations.shape[1],
            action_width=self.actions.shape[1],
            returns=_quantiles(returns),
            lengths=_quantiles(lengths),
            truncated_fraction=float((~self.terminals[last]).mean()),
            terminal_fraction=float(self.terminals.mean()),
            max_action=float(np.abs(self.actions).max(initial=0.0)),
            megabytes=sum(getattr(self, entry.name).nbytes for entry in fields(self)) / 1e6,
        )

    def save(self, path: Path, meta: Mapping[str, Any] | None = None) -> None:
        """Write an .npz file, atomically, with `meta` (JSON values) beside the arrays."""
        arrays = {key: getattr(self, key) for key in FIELDS}
        with atomic_writer(path) as file:
            np.savez(file, meta=np.array(json.dumps(dict(meta or {}))), **arrays)

    @classmethod
    def load(cls, path: Path, *, max_action: float = 1.0) -> tuple[Transitions, dict[str, Any]]:
        """Data and `meta` of an .npz file with the arrays of this class; `timeouts` and `meta` may be absent.

        Raises:
            UserError: the file cannot be read, an array is missing, or :meth:`from_arrays` refuses one.
        """
        try:
            if not zipfile.is_zipfile(path) and Path(path).is_file():
                raise ValueError("it is no whole .npz file; give one, or a D4RL file named .hdf5")
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = json.loads(str(arrays.pop("meta", "{}")))
        except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read transitions from {path}: {error}") from error
        for key in FIELDS[:5]:
            if key not in arrays:
                raise UserError(f"{path} has no array {key!r}: {did_you_mean(key, arrays)}")
        try:
            given = {key: arrays[key] for key in FIELDS if key in arrays}
            return cls.from_arrays(**given, max_action=max_action), meta
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def checked(given: Mapping[str, Any], max_action: float = 1.0) -> dict[str, NDArray[Any]]:
    """The arrays of :class:`Transitions` by name, as float32 and bool, of one length and with finite numbers.

    Raises:
        UserError: as :meth:`Transitions.from_arrays` does; the message names the key and the row.
    """
    arrays = {key: _checked(key, value) for key, value in given.items()}
    rows = len(arrays["observations"])
    for key, array in arrays.items():
        if len(array) != rows:
            raise UserError(f"{key} has {len(array)} rows and observations has {rows}: give one row per step")
    if rows < 2:
        raise UserError(f"the data has {rows} rows: at least 2 are needed")
    if (largest := float(np.abs(arrays["actions"]).max(initial=0.0))) > max_action * (1 + 1e-5):
        row = int(np.abs(arrays["actions"]).max(axis=1).argmax())
        raise UserError(
            f"actions reach {largest:.4g}, outside [-{max_action:g}, {max_action:g}], in row {row}: "
            f"divide them by the largest action, or give max_action={largest:.4g}"
        )
    following = arrays.get("next_observations")
    if following is not None and following.shape != arrays["observations"].shape:
        shapes = following.shape, arrays["observations"].shape
        raise UserError(f"next_observations {shapes[0]} and observations {shapes[1]} must have one shape")
    return arrays


def _checked(key: str, value: Any) -> NDArray[Any]:
    """One array as float32 or bool, with one dimension or two."""
    if isinstance(value, Mapping):
        raise UserError(
            f"{key} are a Dict of {', '.join(map(str, value))}: choose the keys and concatenate their arrays"
        )
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
        if array.dtype == bool:
            return array
        if (wrong := (array != 0) & (array != 1)).any():
            raise UserError(f"{key} must be 0 or 1, row {int(wrong.argmax())} is neither")
        return array.astype(bool)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise UserError(f"{key} is NaN or infinite in float32 at row {row}: repair or drop that episode")
    return array


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    quantiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    return dict(zip(("min", "25%", "median", "75%", "max"), map(float, quantiles), strict=True)) | {
        "mean": float(values.mean(dtype=np.float64))
    }


def different_rows(
    observations: Float32[np.ndarray, "rows observation"], next_observations: Float32[np.ndarray, "rows observation"]
) -> Int64[np.ndarray, " jumps"]:
    """Rows whose successor is not, bit for bit, the next row's observation; the last row is always one."""
    differs = (observations[1:].view(np.uint32) != next_observations[:-1].view(np.uint32)).any(axis=1)
    return np.flatnonzero(np.append(differs, True)).astype(np.int64)


def episode_ends(
    observations: Float32[np.ndarray, "rows observation"],
    next_observations: Float32[np.ndarray, "rows observation"],
    terminals: Bool[np.ndarray, " rows"],
) -> Bool[np.ndarray, " rows"]:
    """Rows whose successor is not where the next row starts (further than 1e-6), terminal rows, and the last row."""
    ends: NDArray[np.bool_] = np.append(_apart(observations[1:], next_observations[:-1]), True) | terminals
    return ends


def _apart(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        apart: NDArray[np.bool_] = np.linalg.norm(first - second, axis=1) > JUMP
    return apart


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
    if timeouts is None:
        timeouts = counted_timeouts(terminals, max_episode_steps, after_timeout=int(terminate_on_end))
    keep = np.ones(len(terminals) - 1, bool) if terminate_on_end else ~timeouts[:-1]
    return {
        "observations": observations[:-1][keep],
        "actions": actions[:-1][keep],
        "rewards": rewards[:-1][keep],
        "next_observations": observations[1:][keep],
        "terminals": terminals[:-1][keep],
    }


def counted_timeouts(
    terminals: Bool[np.ndarray, " steps"],
    max_episode_steps: int | None,
    *,
    after_terminal: int = 1,
    after_timeout: int = 0,
) -> Bool[np.ndarray, " steps"]:
    """Steps at which the time was up: the count, which restarts at the given numbers, is `max_episode_steps` - 1.

    Raises:
        UserError: `max_episode_steps` is not above 1.
    """
    if max_episode_steps is None or max_episode_steps < 2:
        raise UserError("the data has no timeouts: give max_episode_steps (above 1) to split it into episodes")
    final = np.zeros(len(terminals), bool)
    stops = np.flatnonzero(terminals)
    row, count, stop = 0, 0, 0
    while (cut := row + max_episode_steps - 1 - count) < len(final):
        while stop < len(stops) and stops[stop] < row:
            stop += 1
        if stop < len(stops) and stops[stop] < cut:
            row, count = int(stops[stop]) + 1, after_terminal
        else:
            final[cut] = True
            row, count = cut + 1, after_timeout
    return final
