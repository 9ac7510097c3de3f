"""The batches that values of many runs are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_shared.errors import UserError

__all__ = ["Batches"]

SAMPLERS = ("alias", "cdf", "reference")


class Batches:
    """Batches of every run: uniform at first, then by weights; each run's depend on its own seed alone.

    Args:
        rows: of each run's data.
        seeds: one per run.
        device: where the indices are drawn; `reference` draws on the CPU.
        kind: alias, cdf, or reference, the stream of the authors' programs.
        batch_size: rows of one run's batch.

    Raises:
        UserError: `kind` is unknown or `batch_size` below 1.
    """

    def __init__(
        self,
        rows: int,
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        *,
        kind: str = "alias",
        batch_size: int = 256,
    ) -> None:
        if kind not in SAMPLERS or batch_size < 1:
            raise UserError(f"sampler {kind!r}, batch_size {batch_size}: use alias, cdf or reference; at least 1 row")
        self.kind, self.batch_size, self.device = kind, batch_size, torch.device(device)
        uniform = np.ones(rows)
        make: dict[str, Callable[[int], AliasSampler | CdfSampler | ReferenceSampler]] = {
            "alias": lambda seed: AliasSampler(uniform, self.device, seed),
            "cdf": lambda seed: CdfSampler(uniform, self.device, seed),
            "reference": lambda seed: ReferenceSampler(uniform, batch_size, seed),
        }
        self._samplers = [make[kind](seed) for seed in seeds]
        self._uniform = True

    def use(self, weights: Float[np.ndarray, "runs rows"] | None, *, fresh: bool = True) -> None:
        """Draw by these from now on (None: uniformly); `fresh` batches are none that were drawn ahead."""
        self._uniform = weights is None
        for run, sampler in enumerate(self._samplers):
            if weights is not None:
                sampler.set_probs(weights[run])
            state = sampler.state_dict()
            if fresh and "ready" in state:
                sampler.load_state_dict({**state, "ready": state["ready"][:0]})

    def draw(self, steps: int) -> Int64[Tensor, "steps runs batch"]:
        """Batches of `steps` updates."""
        shape = (steps, self.batch_size)
        drawn = [sampler.draw_uniform(shape) if self._uniform else sampler.draw(shape) for sampler in self._samplers]
        return torch.stack(drawn, dim=1).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """States of the generators; the weights belong to the caller."""
        return {str(run): sampler.state_dict() for run, sampler in enumerate(self._samplers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits."""
        for run, sampler in enumerate(self._samplers):
            sampler.load_state_dict(state[str(run)])
