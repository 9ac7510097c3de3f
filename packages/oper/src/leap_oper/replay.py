"""A replay buffer over a fixed data set: prioritised batches, uniform batches, or one of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import ArrayLike
from torch import Tensor

from leap_oper.priorities import Priorities
from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler, memory_for
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline import Transitions

__all__ = ["PrioritizedReplay"]


class PrioritizedReplay:
    """Batches of a data set that lies on `device` as one matrix, so that a batch is one gather.

    Prioritised batches are for the terms that tie the policy to the data, uniform ones for the critic ("decoupled").
    A batch is a dictionary: observations, next_observations, actions (batch, width), rewards, not_terminal (0 where the
    task ended, so that nothing is bootstrapped), weights (mean 1 over the data; batch,) in float32, indices (batch,) in
    int64, and next_actions (batch, width) where they were given. Iteration gives prioritised batches without end.

    Args:
        dataset: what to draw from.
        priorities: of its rows.
        batch_size: rows of a batch; more than there are rows warns, since drawing is with replacement.
        device: of the data, the tables and the batches.
        sampler: alias (O(1)), cdf, or reference (the authors' stream bit for bit).
        seed: of all batches, prioritised and uniform.
        next_actions: those of the data in the next states, for SARSA.

    Raises:
        UserError: the priorities belong to other data, the sampler is unknown, `next_actions` do not fit, or the device
            has too little memory.
    """

    def __init__(
        self,
        dataset: Transitions,
        priorities: Priorities,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        sampler: str = "alias",
        seed: int = 0,
        *,
        next_actions: ArrayLike | None = None,
    ) -> None:
        priorities.check(dataset)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        if sampler not in ("alias", "cdf", "reference"):
            raise UserError(f"sampler {sampler!r}: {did_you_mean(sampler, ('alias', 'cdf', 'reference'))}")
        following = np.zeros((len(dataset), 0)) if next_actions is None else np.asarray(next_actions)
        if next_actions is not None and following.shape != dataset.actions.shape:
            raise UserError(
                f"next_actions have shape {following.shape}, expected that of actions {dataset.actions.shape}"
            )
        if not np.isfinite(following).all():
            raise UserError("next_actions are NaN or infinite: repair or drop those rows")
        if len(dataset) < batch_size:
            warnings.warn(f"{len(dataset)} rows are fewer than a batch of {batch_size}: rows repeat", stacklevel=2)
        self.dataset, self.batch_size = dataset, batch_size
        self.device = resolve_device(device) if isinstance(device, str) else device
        self.sampler: AliasSampler | CdfSampler | ReferenceSampler
        if sampler == "reference":
            self.sampler = ReferenceSampler(priorities.probs, batch_size, seed)
        else:
            kind = AliasSampler if sampler == "alias" else CdfSampler
            self.sampler = kind(priorities.probs, self.device, seed)
        width, actions = dataset.observations.shape[1], dataset.actions.shape[1]
        widths = {"observations": width, "next_observations": width, "actions": actions}
        self._widths = widths | {"rewards": 1, "not_terminal": 1, "weights": 1, "next_actions": following.shape[1]}
        columns = sum(self._widths.values())
        with memory_for(f"a replay buffer of {len(dataset)} rows", 4 * columns * len(dataset), self.device):
            self._rows = torch.empty((len(dataset), columns), device=self.device)
            packed = 2 * width + actions + 2
            self._rows[:, :packed] = torch.from_numpy(dataset.packed())
            self._rows[:, packed] = torch.tensor(priorities.probs * len(dataset))
            self._rows[:, packed + 1 :] = torch.tensor(following)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.sample()

    def sample(self, *, uniform: bool = False) -> dict[str, Tensor]:
        """One batch, drawn by the priorities or uniformly."""
        return self.gather(self._draw((), uniform))

    def sample_many(self, count: int, *, uniform: bool = False) -> dict[str, Tensor]:
        """`count` batches at once, cheaper than one by one; each tensor has `count` in front."""
        return self.gather(self._draw((count,), uniform))

    def sample_decoupled(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A prioritised batch for the policy and a uniform one for the critic, drawn in this order."""
        return self.sample(), self.sample(uniform=True)

    def gather(self, indices: Int64[Tensor, "*shape"]) -> dict[str, Tensor]:
        """The batch of given rows."""
        rows = self._rows.index_select(0, indices.reshape(-1)).view(*indices.shape, -1)
        batch = dict(zip(self._widths, torch.split(rows, list(self._widths.values()), dim=-1), strict=True))
        batch |= {key: batch[key].squeeze(-1) for key in ("rewards", "not_terminal", "weights")}
        if not self._widths["next_actions"]:
            del batch["next_actions"]
        return batch | {"indices": indices}

    def set_priorities(self, priorities: Priorities) -> None:
        """Draw by others from now on (the reference sampler: once its prefetched batches are used up).

        Raises:
            UserError: they belong to other data.
        """
        priorities.check(self.dataset)
        self.sampler.set_probs(priorities.probs)
        column = sum(self._widths.values()) - self._widths["next_actions"] - 1
        self._rows[:, column] = torch.tensor(priorities.probs * len(self)).to(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of batches is; data and priorities belong to the caller."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits."""
        self.sampler.load_state_dict(state["sampler"])

    def _draw(self, count: tuple[int, ...], uniform: bool) -> Int64[Tensor, "*shape"]:
        shape = (*count, self.batch_size)
        if not uniform:
            return self.sampler.draw(shape).to(self.device)
        return self.sampler.draw_uniform(shape).to(self.device)
