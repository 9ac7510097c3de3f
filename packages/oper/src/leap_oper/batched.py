"""What the batched trainers share: one table for all runs' data, the runs' batches, and checkpoints of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_shared.checkpoints import CheckpointFolder
from leap_shared.errors import UserError
from leap_shared.offline import Transitions

__all__ = ["Batches", "RowTable", "restore"]

SAMPLERS = ("alias", "cdf", "reference")


class RowTable:
    """Rows of all data sets in one matrix; runs that share a data set share its rows."""

    def __init__(
        self, datasets: Sequence[Transitions], columns: Callable[[Transitions], Tensor], device: torch.device
    ) -> None:
        unique = {id(dataset): dataset for dataset in datasets}
        starts, total = {}, 0
        for key, dataset in unique.items():
            starts[key] = total
            total += len(dataset)
        parts = [columns(dataset) for dataset in unique.values()]
        self.rows = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(device)
        self._starts = [starts[id(dataset)] for dataset in datasets]
        self._first = torch.tensor(self._starts, device=device)[:, None]

    def gather(self, indices: Int64[Tensor, "runs batch"]) -> Float[Tensor, "runs batch width"]:
        """Row indices[r, b] of run r's data set."""
        return self.rows.index_select(0, (self._first + indices).flatten()).view(*indices.shape, -1)

    def block(self, run: int, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Rows `start` to `stop` of one run's data set; a view."""
        first = self._starts[run]
        return self.rows[first + start : first + stop]


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


def restore(path: Path | None, objects: MutableMapping[str, Any]) -> tuple[CheckpointFolder | None, int]:
    """Folder for the checkpoints of a run and the step it had reached; `objects["settings"]` must be as they were.

    Raises:
        UserError: the folder holds checkpoints of other settings.
    """
    if path is None:
        return None, 0
    folder, settings = CheckpointFolder(path), objects["settings"]
    step = folder.restore(objects) or 0
    if objects["settings"] != settings:
        raise UserError(f"{path} holds the checkpoints of another run: give another folder or delete it")
    return folder, step
