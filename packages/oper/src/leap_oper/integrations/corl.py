"""CORL-style training scripts: their ReplayBuffer, drawn by priorities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from leap_oper.priorities import Priorities
from leap_oper.samplers import AliasSampler
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline import Transitions

__all__ = ["ReplayBuffer"]

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals")
ACTION_TOLERANCE = 1e-4  # some scripts clip actions to a little less than 1


class ReplayBuffer:
    """The ReplayBuffer of CORL's single-file scripts; without priorities it draws uniformly, as theirs does.

    Batches for all terms are ``sample(n)``. For decoupled training the critic takes ``sample(n, uniform=True)`` and the
    policy ``sample(n)``; to reweight, :meth:`sample_weighted` gives uniform rows and the weights to multiply losses by.

    Args:
        state_dim: width of the states.
        action_dim: width of the actions.
        buffer_size: most rows that may be loaded; memory is taken for those that are.
        device: of the rows and the batches.
        priorities: of the rows that will be loaded.
        dataset: the data that the priorities were made for, where the script changes states or rewards before it loads
            them; otherwise the loaded rows themselves must be that data.
        seed: of the draws; None takes that of ``torch.manual_seed``, which such scripts set.

    Raises:
        UserError: the priorities belong to other data than `dataset`, or the device does not exist.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        buffer_size: int,
        device: str | torch.device = "cpu",
        *,
        priorities: Priorities | None = None,
        dataset: Transitions | None = None,
        seed: int | None = None,
    ) -> None:
        if priorities is not None and dataset is not None:
            priorities.check(dataset)
        self._widths, self._buffer_size = [state_dim, action_dim, 1, state_dim, 1], buffer_size
        self._device = resolve_device(device) if isinstance(device, str) else device
        self._priorities, self._dataset = priorities, dataset
        self._seed = torch.initial_seed() if seed is None else seed
        self._rows = torch.empty((0, sum(self._widths)), device=self._device)

    def __len__(self) -> int:
        return len(self._rows)

    def load_d4rl_dataset(self, data: Mapping[str, Any]) -> None:
        """Take the rows of D4RL's q-learning data: observations, actions, rewards, next_observations, terminals.

        Raises:
            UserError: there are rows already, too many, none, of other widths or not those of the priorities.
        """
        if len(self):
            raise UserError("there are rows in this buffer: load into a new one")
        if missing := [key for key in KEYS if key not in data]:
            raise UserError(f"there is no {missing[0]!r}: {did_you_mean(missing[0], data)}")
        rows = Transitions.from_arrays(**{key: data[key] for key in KEYS}, max_action=np.inf)
        if len(rows) > self._buffer_size:
            raise UserError(f"{len(rows)} rows do not fit buffer_size={self._buffer_size}: raise it")
        widths = rows.observations.shape[1], rows.actions.shape[1]
        if widths != tuple(self._widths[:2]):
            raise UserError(f"states and actions have widths {widths}, the buffer was made for {self._widths[:2]}")
        self._check(rows)
        parts = rows.observations, rows.actions, rows.rewards[:, None], rows.next_observations, rows.terminals[:, None]
        self._rows = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32)).to(self._device)
        probs = np.ones(len(rows)) if self._priorities is None else self._priorities.probs
        self.sampler = AliasSampler(probs, self._device, self._seed)
        self._weights = torch.tensor(probs / probs.mean(), dtype=torch.float32, device=self._device)[:, None]

    def _check(self, rows: Transitions) -> None:
        if self._priorities is None:
            return
        if self._dataset is None:
            try:
                self._priorities.check(rows)
            except UserError as error:
                hint = "if states or rewards were changed since, give dataset=, the data as it was"
                raise UserError(f"{error}; {hint}") from error
            return
        expected = self._dataset.actions
        if expected.shape != rows.actions.shape or not np.allclose(
            expected, rows.actions, rtol=0, atol=ACTION_TOLERANCE
        ):
            raise UserError(
                f"the {len(rows)} rows are not those of dataset, {len(expected)} with other actions: "
                "D4RL's own rows are read with compat='d4rl'"
            )

    def sample(self, batch_size: int, *, uniform: bool = False) -> list[Float32[Tensor, "batch _"]]:
        """States, actions, rewards, next states and dones (1 where terminal), of `batch_size` rows.

        Raises:
            UserError: nothing was loaded.
        """
        return self._gather(self._draw(batch_size, uniform=uniform))

    def sample_weighted(self, batch_size: int) -> tuple[list[Float32[Tensor, "batch _"]], Float32[Tensor, "batch 1"]]:
        """As `sample`, drawn uniformly, and the weights (mean 1 over the data) to multiply each row's loss by.

        Raises:
            UserError: nothing was loaded.
        """
        indices = self._draw(batch_size, uniform=True)
        return self._gather(indices), self._weights[indices]

    def add_transition(self, *_: Any) -> None:
        """Refused, as in CORL: the priorities are those of a fixed data set."""
        raise NotImplementedError("this buffer is for offline training: nothing can be added")

    def _draw(self, batch_size: int, *, uniform: bool) -> Int64[Tensor, " batch"]:
        if not len(self):
            raise UserError("the buffer is empty: call load_d4rl_dataset first")
        return (self.sampler.draw_uniform if uniform else self.sampler.draw)((batch_size,))

    def _gather(self, indices: Int64[Tensor, " batch"]) -> list[Float32[Tensor, "batch _"]]:
        return list(torch.split(self._rows.index_select(0, indices), self._widths, dim=1))
