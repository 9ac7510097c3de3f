"""d3rlpy: a replay buffer for its algorithms that draws by priorities, for all terms or for the actor alone.

d3rlpy averages losses over the batch inside its algorithms, where no weights can be multiplied in: this resamples, and
does not reweight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from leap_oper.priorities import Priorities
from leap_oper.samplers import AliasSampler
from leap_shared.errors import UserError
from leap_shared.offline import Transitions

try:
    from d3rlpy.algos import IQL, TD3PlusBC
    from d3rlpy.constants import ActionSpace
    from d3rlpy.dataset import Episode, PartialTrajectory, ReplayBuffer, Signature, Transition, TransitionMiniBatch
    from d3rlpy.torch_utility import TorchMiniBatch
except ImportError as error:
    raise UserError(f'd3rlpy cannot be imported ({error}): pip install "leap-oper[d3rlpy]"') from error

__all__ = ["PrioritizedDataset", "dataset", "decouple"]


class _CutEpisode(Episode):  # type: ignore[misc] # d3rlpy has no types
    """An episode cut by time: one step more than rows, which holds the last row's successor and is never drawn."""

    def __len__(self) -> int:
        return int(self.transition_count)  # its evaluators make windows of this length and fail at an empty one


class _Rows:
    """d3rlpy's buffer protocol: which step of which episode a row is."""

    def __init__(self, data: Transitions) -> None:
        self._data = data
        self._starts = np.flatnonzero(np.append(True, data.ends[:-1]))

    @cached_property
    def episodes(self) -> list[Episode]:
        after, rewards = self._data.next_observations, self._data.rewards[:, None]
        bounds = np.append(self._starts, len(self._data)).tolist()
        return [self._episode(slice(*pair), after, rewards) for pair in pairwise(bounds)]

    def _episode(self, rows: slice, after: NDArray[np.float32], rewards: NDArray[np.float32]) -> Episode:
        columns, last = (self._data.observations[rows], self._data.actions[rows], rewards[rows]), rows.stop - 1
        if self._data.terminals[last]:
            return Episode(*columns, terminated=True)
        extra = after[last], self._data.actions[last], np.zeros(1, np.float32)
        joined = (np.concatenate([column, row[None]]) for column, row in zip(columns, extra, strict=True))
        return _CutEpisode(*joined, terminated=False)

    @property
    def transition_count(self) -> int:
        return len(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> tuple[Episode, int]:
        number = int(self._starts.searchsorted(row, side="right")) - 1
        return self.episodes[number], int(row - self._starts[number])

    def append(self, *_: Any) -> None:
        raise UserError("the priorities are those of a fixed data set: add nothing to it, or make both anew")


class _Picked(Sequence[Any]):
    """Transitions of a batch, each made when it is looked at: few algorithms do."""

    def __init__(self, source: PrioritizedDataset, rows: Int64[np.ndarray, " batch"]) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Picked(self._source, self._rows[index])
        return self._source.pick(int(self._rows[index]))


class PrioritizedDataset(ReplayBuffer):  # type: ignore[misc] # d3rlpy has no types
    """d3rlpy's ReplayBuffer over a fixed data set, whose transitions and trajectories are drawn by priorities.

    A batch holds what d3rlpy itself would put there: zeros for the next observation and action of a terminal, interval
    1. Rows at which time was up are kept with their successor (d3rlpy drops them); since the action there is unknown,
    their next action is the row's own. `transitions` or `transition_picker` apart, a batch costs a few gathers.

    Args:
        data: what to draw from.
        priorities: of its rows.
        seed: of all draws; d3rlpy's own seed does not matter.
        options: d3rlpy's `transition_picker` (called row by row, as d3rlpy does) and `trajectory_slicer`.

    Raises:
        UserError: the priorities belong to other data.
    """

    def __init__(self, data: Transitions, priorities: Priorities, seed: int = 0, **options: Any) -> None:
        priorities.check(data)
        signatures = {"observation": data.observations, "action": data.actions, "reward": data.rewards[:, None]}
        super().__init__(
            _Rows(data),
            action_space=ActionSpace.CONTINUOUS,
            action_size=data.actions.shape[1],
            **{f"{key}_signature": Signature([part.dtype], [part.shape[1:]]) for key, part in signatures.items()},
            **options,
        )
        self._sampler = AliasSampler(priorities.probs, seed=seed)
        self._uniform, self._by_row = False, options.get("transition_picker") is not None
        going = ~data.terminals[:, None]
        following = np.append(data.actions[1:], data.actions[-1:], axis=0)
        following[data.ends] = data.actions[data.ends]
        self._columns = {
            "observations": data.observations,
            "actions": data.actions,
            "rewards": data.rewards[:, None],
            "next_observations": data.next_observations * going,
            "next_actions": following * going,
            "terminals": data.terminals[:, None].astype(np.float32),
        }

    def uniform(self) -> PrioritizedDataset:
        """The same rows, each as likely as any other, from the same stream of random numbers."""
        twin = copy.copy(self)
        twin._uniform = True
        return twin

    def draw(self, count: int) -> Int64[np.ndarray, " count"]:
        """Row numbers of the next `count` transitions."""
        draw = self._sampler.draw_uniform if self._uniform else self._sampler.draw
        return draw((count,)).numpy()

    def pick(self, row: int) -> Transition:
        """The transition of a row, by the transition picker."""
        return self.transition_picker(*self.buffer[row])

    def sample_transition(self) -> Transition:
        """One transition."""
        return self.pick(int(self.draw(1)[0]))

    def sample_transition_batch(self, batch_size: int) -> TransitionMiniBatch:
        """A batch, drawn with replacement."""
        rows = self.draw(batch_size)
        picked = _Picked(self, rows)
        if self._by_row:
            return TransitionMiniBatch.from_transitions(picked)
        columns = {key: column.take(rows, axis=0) for key, column in self._columns.items()}
        return TransitionMiniBatch(**columns, intervals=np.ones((batch_size, 1), np.float32), transitions=picked)

    def sample_trajectory(self, length: int) -> PartialTrajectory:
        """At most `length` steps of an episode, which end in the row that was drawn."""
        return self.trajectory_slicer(*self.buffer[int(self.draw(1)[0])], length)


def dataset(ds: Transitions, w: Priorities, seed: int = 0, **options: Any) -> PrioritizedDataset:
    """Data set for `fit` of any d3rlpy algorithm, so that all terms of its losses see batches drawn by `w`.

    Scalers and evaluators see the data as it is, not as it is drawn. See :class:`PrioritizedDataset`.

    Raises:
        UserError: `w` belongs to other data.
    """
    return PrioritizedDataset(ds, w, seed, **options)


def decouple(algorithm: Any, data: PrioritizedDataset) -> PrioritizedDataset:
    """Have the actor of TD3PlusBC or IQL learn from batches of `data`; returns the same rows to `fit`, drawn uniformly.

    Builds the networks where there are none yet; call it again after anything that builds them anew. The actor's batch
    is drawn when it is needed, after the critic's.

    Raises:
        UserError: it is neither TD3+BC nor IQL. CQL is tied to the data inside its critic's loss, which d3rlpy does not
            split, and BC has no critic.
    """
    if not isinstance(algorithm, (TD3PlusBC, IQL)):
        raise UserError(
            f"{type(algorithm).__name__} cannot be decoupled in d3rlpy, only TD3PlusBC and IQL: "
            "fit the prioritised data set itself, or use leap_oper.Trainer"
        )
    if algorithm.impl is None:
        algorithm.build_with_dataset(data)
    implementation = algorithm.impl

    def update_actor(_: TorchMiniBatch) -> dict[str, float]:
        batch = TorchMiniBatch.from_batch(
            batch=data.sample_transition_batch(algorithm.batch_size),
            gamma=algorithm.gamma,
            compute_returns_to_go=algorithm.need_returns_to_go,
            device=implementation.device,
            observation_scaler=algorithm.observation_scaler,
            action_scaler=algorithm.action_scaler,
            reward_scaler=algorithm.reward_scaler,
        )
        metrics: dict[str, float] = type(implementation).update_actor(implementation, batch)
        return metrics

    implementation.update_actor = update_actor
    return data.uniform()
