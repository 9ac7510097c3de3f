"""Behaviour cloning of many runs (data sets, priorities, seeds) as one batched program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from leap_oper.batched import RowTable, RunSamplers, restore
from leap_oper.networks import StackedMLP
from leap_oper.priorities import Priorities
from leap_shared.checkpoints import check_finite
from leap_shared.errors import UserError
from leap_shared.offline import Transitions, state_normalisation

__all__ = ["BehaviourCloning", "Run"]


@dataclass(frozen=True, eq=False)
class Run:
    """One policy to train: its data, its priorities (None: uniform batches) and its seed."""

    dataset: Transitions
    seed: int
    priorities: Priorities | None = None


class BehaviourCloning:
    """Deterministic policies tanh(MLP(s)), fitted to the actions of drawn rows by mean squared error.

    States are normalised by their data set's mean and deviation. Every run has its own initialisation and its own
    batches, from its seed; one fused Adam step updates all of them.

    Raises:
        UserError: there are no runs, their widths differ, or priorities belong to other data.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        hidden: Sequence[int] = (128, 128),
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        device: str | torch.device = "cpu",
    ) -> None:
        shapes = {(run.dataset.observations.shape[1], run.dataset.actions.shape[1]) for run in runs}
        if len(shapes) != 1:
            raise UserError(f"{len(runs)} runs have observation and action widths {sorted(shapes)}: expected one pair")
        observation, action = shapes.pop()
        for run in runs:
            if run.priorities is not None:
                run.priorities.check(run.dataset)
        self.device, self.batch_size, self.learning_rate = torch.device(device), batch_size, learning_rate
        self.network = StackedMLP((observation, *hidden, action), [run.seed for run in runs]).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate, fused=True)
        scales = [state_normalisation(run.dataset.observations) for run in runs]
        self._mean, self._std = (
            torch.tensor(np.stack(x)[:, None], device=self.device) for x in zip(*scales, strict=True)
        )
        self._table = RowTable(
            [run.dataset for run in runs],
            lambda data: torch.from_numpy(np.concatenate([data.observations, data.actions], axis=1)),
            self.device,
        )
        self._widths = [observation, action]
        self._samplers = RunSamplers([run.seed for run in runs], self.device)
        probabilities = [np.ones(len(r.dataset)) if r.priorities is None else r.priorities.probs for r in runs]
        self._samplers.use(probabilities)
        self._settings = {
            "runs": [
                [r.dataset.fingerprint, r.seed, r.priorities and float(p @ p)]
                for r, p in zip(runs, probabilities, strict=True)
            ],
            "sizes": [*hidden, batch_size, learning_rate],
        }
        self.history: list[dict[str, Any]] = []

    def act(self, observations: Float[Tensor, "runs batch observation"]) -> Float[Tensor, "runs batch action"]:
        """Actions in (-1, 1) of every run's policy for its own states."""
        actions: Tensor = self.network((observations - self._mean) / self._std).tanh()
        return actions

    def policy(self, run: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """One run's policy on arrays: observations (batch, width) to actions (batch, width)."""
        chosen = slice(run, run + 1)

        @torch.no_grad()
        def act(observations: NDArray[np.float32]) -> NDArray[np.float32]:
            states = (torch.from_numpy(observations).to(self.device) - self._mean[chosen]) / self._std[chosen]
            actions: NDArray[np.float32] = self.network(states, chosen).tanh()[0].cpu().numpy()
            return actions

        return act

    def train(
        self,
        steps: int,
        *,
        every: int = 500,
        out: Path | None = None,
        evaluate: Callable[[BehaviourCloning], dict[str, Any]] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Train to `steps` updates in all.

        Args:
            steps: updates of each run.
            every: updates between two records of the history, and two checkpoints.
            out: folder of checkpoints; a killed call goes on from the last one, to the same bits on CPU.
            evaluate: what to add to each record, as plain values.
            progress: called with the number of updates done.

        Returns:
            The history: {step, loss (per run), ...}.

        Raises:
            UserError: a loss is not finite, or `out` belongs to another run.
        """
        objects: dict[str, Any] = {"settings": {**self._settings, "every": every}, "history": self.history}
        objects |= {"network": self.network, "optimizer": self.optimizer}
        objects |= {f"generator{i}": generator for i, generator in enumerate(self._samplers.generators)}
        folder, done = restore(out, objects)
        self.history = objects["history"]
        if progress is not None:
            progress(min(done, steps))
        while done < steps:
            indices = self._samplers.draw(min(every, steps - done), self.batch_size)
            losses = torch.stack([self.update(batch) for batch in indices])
            done += len(indices)
            check_finite(losses.sum(), done, folder)
            record = {"step": done, "loss": losses.mean(dim=0).tolist()}
            self.history.append(record | (evaluate(self) if evaluate is not None else {}))
            if folder is not None:
                folder.save(done, {**objects, "history": self.history})
            if progress is not None:
                progress(len(indices))
        if folder is not None:
            folder.close()
        return self.history

    def update(self, indices: Int64[Tensor, "runs batch"]) -> Float[Tensor, " runs"]:
        """One update on the given rows; returns the loss of each run before it."""
        observations, actions = torch.split(self._table.gather(indices), self._widths, dim=-1)
        loss: Tensor = (self.act(observations) - actions).square().mean(dim=(1, 2))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())
        self.optimizer.step()
        return loss.detach()
