"""The data of many runs as one table on the device, so that a batch of all of them is one gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.returns import state_normalisation
from leap_shared.offline.transitions import Transitions

__all__ = ["Rows", "known_next_actions"]

Rewards = Callable[[Transitions], Float32[np.ndarray, " rows"]]


def known_next_actions(dataset: Transitions) -> NDArray[np.bool_]:
    """Rows whose next action is known (the next row's) or does not matter (terminals)."""
    known: NDArray[np.bool_] = np.logical_or(~dataset.ends, dataset.terminals)
    known[-1] = dataset.terminals[-1]
    return known


class Rows:
    """Rows of all data sets in one matrix; runs that share a data set share its rows.

    Args:
        datasets: one per run, the same object for runs that share it.
        device: where the table lies.
        normalise: whether states are brought to mean 0 and deviation 1 (+ 1e-3).
        rewards: what takes the place of the recorded rewards.
        weights: one array per run or None, of mean 1; None stands for ones.
        next_actions: whether batches hold them; rows without one must then not be drawn.

    Raises:
        UserError: widths of the data sets differ, or weights do not fit their data.
    """

    def __init__(
        self,
        datasets: Sequence[Transitions],
        device: str | torch.device = "cpu",
        *,
        normalise: bool = False,
        rewards: Rewards | None = None,
        weights: Sequence[ArrayLike | None] | None = None,
        next_actions: bool = False,
    ) -> None:
        shapes = {(data.observations.shape[1], data.actions.shape[1]) for data in datasets}
        if len(shapes) != 1:
            raise UserError(f"{len(datasets)} runs have observation and action widths {sorted(shapes)}: give one pair")
        ((self.observation, self.action),) = shapes
        self.device, self.lengths = torch.device(device), [len(data) for data in datasets]
        self._widths = [self.observation, self.observation, self.action, 1, 1, *([self.action] if next_actions else [])]
        unique = {id(data): data for data in datasets}
        starts = dict(zip(unique, np.cumsum([0, *map(len, unique.values())]).tolist(), strict=False))
        scales = {key: state_normalisation(data.observations) for key, data in unique.items()} if normalise else {}
        tables = []
        for key, data in unique.items():
            table = data.packed()
            if rewards is not None:
                table[:, 2 * self.observation + self.action] = rewards(data)
            if normalise:
                states = table[:, : 2 * self.observation].reshape(len(data), 2, -1)
                table[:, : 2 * self.observation] = ((states - scales[key].mean) / scales[key].std).reshape(
                    len(data), -1
                )
            tables.append(np.concatenate([table, np.roll(data.actions, -1, axis=0)], axis=1) if next_actions else table)
        self.table = torch.from_numpy(np.concatenate(tables) if len(tables) > 1 else tables[0]).to(self.device)
        self._first = self._column([starts[id(data)] for data in datasets])
        self.mean, self.std = self._scales([scales.get(id(data)) for data in datasets])
        self._weights, self._first_weight = self._stacked(weights)

    def _column(self, numbers: Sequence[int]) -> Int64[Tensor, "runs 1"]:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)[:, None]

    def _scales(self, found: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]] | None]) -> tuple[Tensor, Tensor]:
        zero, one = np.zeros(self.observation, np.float32), np.ones(self.observation, np.float32)
        pairs = [(zero, one) if pair is None else pair for pair in found]
        parts = (np.stack(part)[:, None] for part in zip(*pairs, strict=True))
        mean, std = (torch.from_numpy(part).to(self.device) for part in parts)
        return mean, std

    def _stacked(self, weights: Sequence[ArrayLike | None] | None) -> tuple[Tensor | None, Tensor]:
        """All weights behind each other, and where those of each run begin; runs may share an array."""
        given = [None] * len(self.lengths) if weights is None else list(weights)
        if all(part is None for part in given):
            return None, self._first
        arrays: dict[int, NDArray[np.float32]] = {}
        for part, length in zip(given, self.lengths, strict=True):
            array = np.ones(length, np.float32) if part is None else np.asarray(part, np.float32)
            if array.shape != (length,):
                raise UserError(
                    f"there are weights of shape {array.shape} for {length} rows: compute them for this data"
                )
            arrays.setdefault(id(part), array)
        starts = dict(zip(arrays, np.cumsum([0, *map(len, arrays.values())]).tolist(), strict=False))
        stacked = torch.from_numpy(np.concatenate(list(arrays.values()))).to(self.device)
        return stacked, self._column([starts[id(part)] for part in given])

    def batch(self, indices: Int64[Tensor, "runs batch"]) -> Batch:
        """Row indices[r, b] of run r's data."""
        flat = (indices + self._first).flatten()
        gathered = self.table.index_select(0, flat).view(*indices.shape, -1)
        states, after, actions, rewards, going, *rest = torch.split(gathered, self._widths, dim=-1)
        if self._weights is None:
            weights = torch.ones_like(rewards[..., 0])
        else:
            weights = self._weights.take(indices + self._first_weight)
        return Batch(states, actions, rewards[..., 0], after, going[..., 0], weights, *rest)
