"""What all algorithms share: batches of many runs, hyperparameters by run, and the interface that a trainer drives."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.offline.networks import Adam, StackedMLP

__all__ = ["Algorithm", "Batch", "Logs", "Number", "by_run", "twice"]

Number = float | tuple[float, ...]
"""A hyperparameter: one value for all runs, or one for each."""

Logs = dict[str, Float[Tensor, " runs"]]


class Batch(NamedTuple):
    """Rows of every run's own data."""

    observations: Float[Tensor, "runs batch observation"]
    actions: Float[Tensor, "runs batch action"]
    rewards: Float[Tensor, "runs batch"]
    next_observations: Float[Tensor, "runs batch observation"]
    not_terminal: Float[Tensor, "runs batch"]
    weights: Float[Tensor, "runs batch"]
    """Of mean 1 over the data: multiplies the losses whose `reweight` flag is set."""
    next_actions: Float[Tensor, "runs batch action"] | None = None


class Algorithm(ABC):
    """`len(seeds)` runs of one algorithm as one program.

    A trainer calls ``update(batch, policy_batch, noise)``: the batch of the critic (uniform where decoupled), that of
    the terms that tie the policy to the data (None: the same), and what `noise` gave. Everything that the next update
    depends on is in `parts` and `updates`.
    """

    name: ClassVar[str]
    period: ClassVar[int] = 1
    """Updates after which the sequence of operations repeats."""
    needs_next_actions: ClassVar[bool] = False
    config: Any
    """The frozen dataclass of its hyperparameters."""

    def __init__(self, observation: int, action: int, seeds: Sequence[int], device: str | torch.device) -> None:
        if not seeds:
            raise UserError("there are no seeds: give at least one")
        self.observation, self.action = observation, action
        self.seeds, self.device = list(seeds), torch.device(device)
        self.updates = 0
        if self.device.type == "cpu":  # once this is freed, glibc keeps what large temporaries return instead of
            torch.empty(31 << 20, dtype=torch.uint8)  # unmapping it: CQL would take thousands of page faults an update

    @property
    def normalises_states(self) -> bool:
        """Whether the algorithm's authors bring states to mean 0 and deviation 1."""
        return False

    @property
    def phase(self) -> str:
        """Name of the operations that the next update consists of."""
        return self.name

    def same_for(self) -> int:
        """Number of updates to come in this phase."""
        return sys.maxsize

    @abstractmethod
    def parts(self) -> Mapping[str, StackedMLP | Adam]:
        """Networks and optimisers by name: what a checkpoint holds beside `updates`."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Set what depends on `updates` alone, such as learning rates: called before an update, outside its graph."""

    def wants_policy_batch(self) -> bool:
        """Whether the next update has terms that tie the policy to the data."""
        return True

    def noise(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG002 - the interface
        """Normal numbers that the next update needs."""
        return ()

    @abstractmethod
    def update(self, batch: Batch, policy_batch: Batch | None, noise: Sequence[Tensor]) -> Logs:
        """One update of every run; returns batch means before it."""

    @abstractmethod
    def act(
        self, observations: Float[Tensor, "runs batch observation"], chosen: slice = slice(None)
    ) -> Float[Tensor, "runs batch action"]:
        """Deterministic actions of the `chosen` runs."""

    @abstractmethod
    def export(self, run: int) -> dict[str, dict[str, Tensor]]:
        """Parameters of one run by network, under the names of the authors' checkpoints."""

    @abstractmethod
    def load(self, run: int, states: Mapping[str, Mapping[str, ArrayLike | Tensor]]) -> None:
        """Take over what `export` gives."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        return {"updates": self.updates, **{name: part.state_dict() for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.updates = int(state["updates"])
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def by_run(name: str, value: Number, runs: int, device: torch.device) -> Float[Tensor, " runs"]:
    """A hyperparameter as one number per run.

    Raises:
        UserError: there are as many values as neither one nor runs.
    """
    values = value if isinstance(value, tuple) else (value,) * runs
    if len(values) != runs:
        raise UserError(f"{name} has {len(values)} values for {runs} runs: give one, or one per run")
    return torch.tensor(values, dtype=torch.float32, device=device)


def twice(inputs: Float[Tensor, "runs batch width"]) -> Float[Tensor, "networks batch width"]:
    """The inputs of every run for its two critics, which follow each other in a stack."""
    return inputs[:, None].expand(-1, 2, -1, -1).flatten(0, 1)
