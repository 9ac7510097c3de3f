"""A replay buffer over a fixed data set: prioritised batches, uniform batches, or one of each."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from leap_oper.priorities import Priorities
from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline import Transitions

__all__ = ["PrioritizedReplay"]


class PrioritizedReplay:
    """Batches of a data set that lies on `device` as one matrix, so that a batch is one gather.

    Prioritised batches are for the terms that tie the policy to the data, uniform ones for the critic ("decoupled").

    Raises:
        UserError: the priorities belong to other data, or the sampler is unknown.
    """

    def __init__(
        self,
        dataset: Transitions,
        priorities: Priorities,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        sampler: str = "alias",
        seed: int = 0,
    ) -> None:
        priorities.check(dataset)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give at least 1")
        if len(dataset) < batch_size:
            warnings.warn(f"{len(dataset)} rows are fewer than a batch of {batch_size}: rows repeat", stacklevel=2)
        if sampler == "reference":
            self.sampler: AliasSampler | CdfSampler | ReferenceSampler = ReferenceSampler(
                priorities.probs, batch_size, seed
            )
        elif sampler in ("alias", "cdf"):
            kind = AliasSampler if sampler == "alias" else CdfSampler
            self.sampler = kind(priorities.probs, device, seed)
        else:
            raise UserError(f"sampler {sampler!r}: {did_you_mean(sampler, ('alias', 'cdf', 'reference'))}")
        self.batch_size, self.device = batch_size, torch.device(device)
        self.rows = torch.as_tensor(dataset.packed(), device=device)
        self.weights = torch.as_tensor(priorities.weights, dtype=torch.float32, device=device)
        width, actions = dataset.observations.shape[1], dataset.actions.shape[1]
        self._widths = [width, width, actions, 1, 1]
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def sample(self, *, uniform: bool = False) -> dict[str, Tensor]:
        """One batch: observations, next_observations, actions, rewards, not_terminal, indices and weights."""
        return {key: value[0] for key, value in self.sample_many(1, uniform=uniform).items()}

    def sample_many(self, count: int, *, uniform: bool = False) -> dict[str, Tensor]:
        """`count` batches at once; each tensor is (count, batch_size) or (count, batch_size, width)."""
        shape = (count, self.batch_size)
        if not uniform:
            indices = self.sampler.draw(shape).to(self.device)
        elif isinstance(self.sampler, ReferenceSampler):
            indices = torch.stack([self.sampler.draw_uniform(shape[1:]) for _ in range(count)]).to(self.device)
        else:
            indices = torch.randint(len(self.rows), shape, generator=self.generator, device=self.device)
        parts = torch.split(self.rows[indices], self._widths, dim=-1)
        batch = dict(zip(("observations", "next_observations", "actions"), parts, strict=False))
        batch |= {"rewards": parts[3].squeeze(-1), "not_terminal": parts[4].squeeze(-1)}
        return batch | {"indices": indices, "weights": self.weights[indices]}
