"""torchrl: a sampler that draws by priorities, and the data set in torchrl's layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from leap_oper.priorities import Priorities
from leap_oper.samplers import AliasSampler
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError
from leap_shared.files import atomic_writer, ensure_folder
from leap_shared.offline import Transitions

try:
    from tensordict import TensorDict
    from torchrl.data import ImmutableDatasetWriter, Storage, TensorDictReplayBuffer, TensorStorage
    from torchrl.data.replay_buffers.samplers import Sampler
except ImportError as error:
    raise UserError(f'torchrl cannot be imported ({error}): pip install "leap-oper[torchrl]"') from error

__all__ = ["PrioritySampler", "replay_buffer", "sampler", "storage"]

STATE_FILE = "leap_oper_sampler.npz"


class PrioritySampler(Sampler):  # type: ignore[misc] # torchrl has no types
    """Rows drawn with replacement by static priorities (or uniformly), in O(1) each; see :func:`sampler`."""

    def __init__(self, priorities: Priorities, seed: int, device: torch.device, *, uniform: bool) -> None:
        self.table, self.uniform = AliasSampler(priorities.probs, device, seed), uniform
        self.weights = torch.tensor(priorities.probs * len(priorities), dtype=torch.float32, device=device)

    def sample(self, storage: Storage, batch_size: int) -> tuple[Int64[Tensor, " batch"], dict[str, Any]]:
        """Indices and their weights, as `_weight`.

        Raises:
            UserError: there is not one weight for each row of the storage.
        """
        if len(storage) != len(self.weights):
            raise UserError(
                f"there are {len(self.weights)} weights for {len(storage)} rows: compute them for this data"
            )
        if self._rng is not None:
            self.table.generator = self._rng
        index = (self.table.draw_uniform if self.uniform else self.table.draw)((batch_size,))
        return index, {"_weight": self.weights[index]}

    def state_dict(self) -> dict[str, Any]:
        """State of the generator; the priorities belong to the caller."""
        return self.table.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits."""
        self.table.load_state_dict(state_dict)

    def dumps(self, path: Path | str) -> None:
        """Write the state into the folder `path`."""
        ensure_folder(Path(path))
        with atomic_writer(Path(path) / STATE_FILE) as file:
            np.savez(file, generator=self.table.state_dict()["generator"].numpy())

    def loads(self, path: Path | str) -> None:
        """Go on from what `dumps` wrote.

        Raises:
            UserError: there is no such file.
        """
        try:
            with np.load(Path(path) / STATE_FILE, allow_pickle=False) as file:
                self.load_state_dict({"generator": torch.from_numpy(file["generator"])})
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no state of this sampler, written by dumps: {error}") from error

    def _empty(self) -> None:
        """Nothing: the storage that a buffer emptied no longer has a row for each weight, which `sample` refuses."""


def sampler(
    w: Priorities, seed: int = 0, *, device: str | torch.device = "cpu", uniform: bool = False
) -> PrioritySampler:
    """Sampler for torchrl's replay buffers over data in the order of the weights.

    Batches get the weights (mean 1 over the data) as `_weight`. The name is not torchrl's `priority_weight` because
    torchrl's losses multiply that in by themselves, which would count the priorities twice; to reweight instead of
    resample, draw uniformly and copy `_weight` to `priority_weight`.

    Args:
        w: the priorities.
        seed: of the draws, unless the buffer is given a generator, which is then used.
        device: of the indices; the storage's.
        uniform: draw all rows alike, for the critic's batches or to reweight.

    Raises:
        UserError: there are several seeds or iterations in `w`, or the device does not exist.
    """
    found = resolve_device(device) if isinstance(device, str) else device
    return PrioritySampler(w, seed, found, uniform=uniform)


def storage(ds: Transitions, *, device: str | torch.device = "cpu") -> TensorStorage:
    """The data set as one tensordict on `device`: observation, action and, under next, their consequences.

    These are observation, reward, done, terminated and truncated, the last four of shape (rows, 1).

    Raises:
        UserError: the device does not exist.
    """
    found = resolve_device(device) if isinstance(device, str) else device
    following = {
        "observation": ds.next_observations,
        "reward": ds.rewards[:, None],
        "done": ds.ends[:, None],
        "terminated": ds.terminals[:, None],
        "truncated": (ds.ends & ~ds.terminals)[:, None],
    }
    rows = {
        "observation": torch.tensor(ds.observations, device=found),
        "action": torch.tensor(ds.actions, device=found),
        "next": {key: torch.tensor(array, device=found) for key, array in following.items()},
    }
    filled = TensorStorage(TensorDict(rows, batch_size=[len(ds)], device=found), device=found)
    filled.set(len(ds) - 1, filled.get(len(ds) - 1))  # torchrl's dumps asks which row was written last
    return filled


def replay_buffer(
    ds: Transitions,
    w: Priorities,
    batch_size: int = 256,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **options: Any,
) -> TensorDictReplayBuffer:
    """A replay buffer of torchrl over the data set, drawn by `w`; nothing can be added to it.

    For uniform batches of the same rows, give its `storage` to another buffer with ``sampler(w, uniform=True)``.

    Args:
        ds: the data.
        w: its priorities.
        batch_size: rows of a batch; more than there are warns, since drawing is with replacement.
        seed: of the draws.
        device: of the data and the batches.
        options: for TensorDictReplayBuffer, such as transform, prefetch and pin_memory.

    Raises:
        UserError: `w` belongs to other data, or the device does not exist.
    """
    w.check(ds)
    if len(ds) < batch_size:
        warnings.warn(f"{len(ds)} rows are fewer than a batch of {batch_size}: rows repeat", stacklevel=2)
    return TensorDictReplayBuffer(
        storage=storage(ds, device=device),
        sampler=sampler(w, seed, device=device),
        writer=ImmutableDatasetWriter(),
        batch_size=batch_size,
        **options,
    )
