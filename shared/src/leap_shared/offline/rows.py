"""The data of many runs as one matrix on the device, so that a batch of all of them is one gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.algorithms.base import Batch
from leap_shared.offline.returns import StateNormalisation, state_normalisation
from leap_shared.offline.transitions import Transitions

__all__ = ["RowTable", "Rows", "known_next_actions"]

Rewards = Callable[[Transitions], Float32[np.ndarray, " rows"]]


def known_next_actions(dataset: Transitions) -> NDArray[np.bool_]:
    """Rows whose next action is known (the next row's) or does not matter (terminals)."""
    known: NDArray[np.bool_] = np.logical_or(~dataset.ends, dataset.terminals)
    known[-1] = dataset.terminals[-1]
    return known


class RowTable:
    """Rows of the sources of all runs in one matrix; runs that share a source share its rows.

    Args:
        sources: one per run, the same object for runs that share it.
        columns: the rows of a source.
        device: where the matrix lies.
    """

    def __init__(
        self, sources: Sequence[Any], columns: Callable[[Any], Float[Tensor, "rows width"]], device: torch.device
    ) -> None:
        unique = {id(source): source for source in sources}
        parts = [columns(source) for source in unique.values()]
        self.rows = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device)
        starts = dict(zip(unique, np.cumsum([0, *map(len, parts)]).tolist(), strict=False))
        self._starts = [starts[id(source)] for source in sources]
        self._first = torch.tensor(self._starts, device=device)[:, None]

    def gather(self, indices: Int64[Tensor, "runs batch"]) -> Float[Tensor, "runs batch width"]:
        """Row indices[r, b] of run r's source."""
        return self.rows.index_select(0, (self._first + indices).flatten()).view(*indices.shape, -1)

    def block(self, run: int, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Rows `start` to `stop` of one run's source; a view."""
        first = self._starts[run]
        return self.rows[first + start : first + stop]


class Rows:
    """Batches of all runs from one table of transitions.

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
        ((width, action),) = shapes
        self.device, self.lengths = torch.device(device), [len(data) for data in datasets]
        self._widths = [width, width, action, 1, 1, *([action] if next_actions else [])]
        same = StateNormalisation(np.zeros(width, np.float32), np.ones(width, np.float32))
        known = {id(data): state_normalisation(data.observations) if normalise else same for data in datasets}

        def columns(data: Transitions) -> Tensor:
            table, (mean, std) = data.packed(), known[id(data)]
            if rewards is not None:
                table[:, 2 * width + action] = rewards(data)
            if normalise:
                table[:, : 2 * width] -= np.tile(mean, 2)
                table[:, : 2 * width] /= np.tile(std, 2)
            following = [np.roll(data.actions, -1, axis=0)] if next_actions else []
            return torch.from_numpy(np.concatenate([table, *following], axis=1) if following else table)

        self.table = RowTable(datasets, columns, self.device)
        scales = [known[id(data)] for data in datasets]
        self.mean, self.std = (
            torch.from_numpy(np.stack(part)[:, None]).to(self.device) for part in zip(*scales, strict=True)
        )
        self._weights = None if weights is None or all(w is None for w in weights) else self._weighted(weights)

    def _weighted(self, weights: Sequence[ArrayLike | None]) -> RowTable:
        ones = {length: np.ones(length, np.float32) for length in self.lengths}
        given = [ones[n] if w is None else w for n, w in zip(self.lengths, weights, strict=True)]
        for length, array in zip(self.lengths, given, strict=True):
            if np.shape(array) != (length,):
                raise UserError(
                    f"there are weights of shape {np.shape(array)} for {length} rows: compute them for these"
                )
        return RowTable(given, lambda array: torch.as_tensor(array, dtype=torch.float32)[:, None], self.device)

    def batch(self, indices: Int64[Tensor, "runs batch"]) -> Batch:
        """Row indices[r, b] of run r's data."""
        states, after, actions, rewards, going, *rest = torch.split(self.table.gather(indices), self._widths, dim=-1)
        weights = torch.ones_like(rewards) if self._weights is None else self._weights.gather(indices)
        return Batch(states, actions, rewards[..., 0], after, going[..., 0], weights[..., 0], *rest)
