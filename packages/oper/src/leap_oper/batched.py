"""What the batched trainers share: one table for all runs' data, the runs' batches, and checkpoints of the whole."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from leap_oper.samplers import AliasSampler
from leap_shared.checkpoints import CheckpointFolder
from leap_shared.errors import UserError
from leap_shared.offline import Transitions

__all__ = ["RowTable", "RunSamplers", "restore"]


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
        self.rows = torch.cat([columns(dataset) for dataset in unique.values()]).to(device)
        self.first = torch.tensor([[starts[id(dataset)]] for dataset in datasets], device=device)

    def gather(self, indices: Int64[Tensor, "runs batch"]) -> Float[Tensor, "runs batch width"]:
        """Row indices[r, b] of run r's data set."""
        return self.rows[self.first + indices]


class RunSamplers:
    """One alias sampler per run; a run's batches depend on its own seed alone."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.device = device
        self.samplers: list[AliasSampler] = []

    def use(self, probabilities: Sequence[ArrayLike]) -> None:
        """Draw by these from now on."""
        self.samplers = [AliasSampler(p, self.device) for p in probabilities]
        for sampler, generator in zip(self.samplers, self.generators, strict=True):
            sampler.generator = generator

    def draw(self, steps: int, batch_size: int) -> Int64[Tensor, "steps runs batch"]:
        """Batches of `steps` updates."""
        return torch.stack([sampler.draw((steps, batch_size)) for sampler in self.samplers], dim=1)


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
