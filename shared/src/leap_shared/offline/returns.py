"""What follows from rewards: returns of episodes, returns to go, n-step returns; and the scale of states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64
from numpy.typing import NDArray

from leap_shared.errors import UserError

__all__ = [
    "NStep",
    "StateNormalisation",
    "discounted_return_to_go",
    "episode_returns",
    "n_step",
    "state_normalisation",
]

SHORT = 32


class NStep(NamedTuple):
    """Sum of `steps` discounted rewards, whether the episode ended in them, and the state after them."""

    returns: Float32[np.ndarray, " rows"]
    done: Bool[np.ndarray, " rows"]
    states: Float32[np.ndarray, "rows observation"]


class StateNormalisation(NamedTuple):
    """Mean and standard deviation (with 1e-3 added) of each component of the observations."""

    mean: Float32[np.ndarray, " observation"]
    std: Float32[np.ndarray, " observation"]


def episode_returns(
    rewards: Float32[np.ndarray, " rows"], ends: Bool[np.ndarray, " rows"]
) -> Float32[np.ndarray, " rows"]:
    """Undiscounted return of its episode for every row, summed in float32 one reward after the other."""
    last = np.flatnonzero(ends)
    last = last if len(last) and last[-1] == len(rewards) - 1 else np.append(last, len(rewards) - 1)
    first = np.append(0, last[:-1] + 1)
    lengths = last - first + 1
    sums = rewards[first]
    for episode in np.flatnonzero(lengths > SHORT):
        sums[episode] = np.add.accumulate(rewards[first[episode] : last[episode] + 1])[-1]
    for step in range(1, SHORT):  # short episodes may be many: all of them take a step at once
        going = np.flatnonzero((lengths > step) & (lengths <= SHORT))
        sums[going] += rewards[first[going] + step]
    return np.repeat(sums, lengths)


def discounted_return_to_go(
    rewards: Float[np.ndarray, " rows"], ends: Bool[np.ndarray, " rows"], discount: float = 0.99
) -> Float64[np.ndarray, " rows"]:
    """Sum of discount^k r[i+k] up to the end of row i's episode, in float64.

    Each pass doubles the number of rewards summed, so there are log2(longest episode) passes over the rows.
    """
    total = rewards.astype(np.float64)
    within = ~ends
    within[-1:] = False
    span = 1
    while within.any():
        rows = np.flatnonzero(within)
        total[rows] += discount**span * total[rows + span]
        within[rows] = within[rows + span]
        span *= 2
    return total


def n_step(
    rewards: Float32[np.ndarray, " rows"],
    next_observations: Float32[np.ndarray, "rows observation"],
    ends: Bool[np.ndarray, " rows"],
    discount: float,
    steps: int,
) -> NStep:
    """Returns over `steps` rows; an end of any kind among them stops the sum and counts as done (no bootstrap).

    The last `steps` - 1 rows, whose successors do not exist, get zero states.

    Raises:
        UserError: `steps` is below 1 or above the number of rows.
    """
    rows = len(rewards)
    if not 1 <= steps <= rows:
        raise UserError(f"n_step is {steps}: give 1 to {rows}, the number of rows")
    returns, done = rewards.astype(np.float64), ends.copy()
    for k in range(1, steps):
        going = np.flatnonzero(~done[: rows - k])
        returns[going] += discount**k * rewards[going + k]
        done[going] = ends[going + k]
    states = np.zeros_like(next_observations)
    states[: rows - steps + 1] = next_observations[steps - 1 :]
    return NStep(returns.astype(np.float32), done, states)


def state_normalisation(observations: Float32[np.ndarray, "rows observation"]) -> StateNormalisation:
    """Mean and population standard deviation + 1e-3, accumulated in float64."""
    mean: NDArray[np.float64] = observations.mean(axis=0, dtype=np.float64)
    std: NDArray[np.float64] = observations.std(axis=0, dtype=np.float64)
    return StateNormalisation(mean.astype(np.float32), (std + 1e-3).astype(np.float32))
