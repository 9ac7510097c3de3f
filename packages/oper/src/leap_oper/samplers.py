"""Rows drawn with given probabilities, with replacement: in O(1), from the cumulative sum, or as the authors draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from leap_shared.errors import UserError

__all__ = ["AliasSampler", "CdfSampler", "ReferenceSampler"]


def _checked(probs: ArrayLike | Tensor, device: str | torch.device) -> Float[Tensor, " rows"]:
    weights = torch.as_tensor(probs, dtype=torch.float64, device=device).reshape(-1)
    if not weights.numel() or not torch.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UserError("probabilities must be finite, not negative and not all zero")
    return weights / weights.sum()


class AliasSampler:
    """O(1) per draw from two tables (threshold float64, alias int32: 12 bytes a row) that live on `device`.

    The tables are those of Vose's sweep over light and heavy rows, found at once by prefix sums instead of one row
    after the other (Lehmann, Hübschle-Schneider and Sanders 2019). A draw takes a row and a uniform number u: it is
    that row if u < threshold, else the row's alias.
    """

    def __init__(self, probs: ArrayLike | Tensor, device: str | torch.device = "cpu", seed: int = 0) -> None:
        filled = _checked(probs, device)
        rows = filled.numel()
        filled *= rows
        light = filled < 1
        small, large = torch.nonzero(light).flatten(), torch.nonzero(~light).flatten()
        if not large.numel():  # rounding left every row just below the mean: they are equal
            small, large = large, small
        missing = torch.cat([filled.new_zeros(1), torch.cumsum(1 - filled[small], 0)])
        excess = torch.cumsum(filled[large] - 1, 0)
        self.threshold = filled.clamp_(max=1)
        self.alias = torch.arange(rows, dtype=torch.int32, device=filled.device)
        if small.numel():
            giver = torch.searchsorted(excess, missing[:-1], right=True).clamp_(max=len(large) - 1)
            self.alias[small] = large[giver].int()
            taken = missing[torch.searchsorted(missing, excess).clamp_(max=len(small))]
            left = (1 + excess - taken).clamp_(0, 1)
            left[-1] = 1
            self.threshold[large] = left
            self.alias[large[:-1]] = large[1:].int()
        self.generator = torch.Generator(filled.device).manual_seed(seed)

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        device, count = self.threshold.device, self.threshold.numel()
        rows = torch.randint(count, tuple(shape), generator=self.generator, device=device)
        u = torch.rand(tuple(shape), generator=self.generator, device=device, dtype=torch.float64)
        return torch.where(u < self.threshold[rows], rows, self.alias[rows].long())

    def mass(self) -> Float[Tensor, " rows"]:
        """Probability of each row that the tables stand for."""
        total = self.threshold.clone()
        return total.index_add_(0, self.alias.long(), 1 - self.threshold) / total.numel()


class CdfSampler:
    """O(log rows) per draw by bisection of the cumulative sum (8 bytes a row) on `device`."""

    def __init__(self, probs: ArrayLike | Tensor, device: str | torch.device = "cpu", seed: int = 0) -> None:
        cumulative = torch.cumsum(_checked(probs, device), 0)
        self.cumulative = cumulative / cumulative[-1]
        self.generator = torch.Generator(cumulative.device).manual_seed(seed)

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        device = self.cumulative.device
        u = torch.rand(tuple(shape), generator=self.generator, device=device, dtype=torch.float64)
        return torch.searchsorted(self.cumulative, u, right=True)


class ReferenceSampler:
    """The authors' stream, bit for bit: NumPy's legacy generator, `n_prefetch` batches at a time."""

    def __init__(self, probs: ArrayLike | Tensor, batch_size: int = 256, seed: int = 0, n_prefetch: int = 1000) -> None:
        _checked(probs, "cpu")
        cumulative = np.asarray(probs, dtype=np.float64).reshape(-1).cumsum()
        self.cumulative = cumulative / cumulative[-1]
        self.batch_size = batch_size
        self.n_prefetch = max(1, min(n_prefetch, len(cumulative) // batch_size))
        self.random = np.random.RandomState(seed)
        self._ready = np.empty((0, batch_size), np.int64)

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """The next batches; the last size must be `batch_size`."""
        if not shape or shape[-1] != self.batch_size:
            raise UserError(f"shape {tuple(shape)} must end with the batch size {self.batch_size}")
        count = math.prod(shape[:-1])
        while len(self._ready) < count:
            uniform = self.random.random_sample(self.n_prefetch * self.batch_size)
            rows = self.cumulative.searchsorted(uniform, side="right").reshape(-1, self.batch_size)
            self._ready = np.concatenate([self._ready, rows])
        taken, self._ready = self._ready[:count], self._ready[count:]
        return torch.from_numpy(taken.copy()).reshape(tuple(shape))

    def draw_uniform(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """The authors' uniform batches, from the same generator."""
        return torch.from_numpy(self.random.randint(len(self.cumulative), size=tuple(shape)))
