"""OPER-A: priorities from advantages, whose value networks are fitted to batches drawn by the priorities so far."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from leap_oper.batched import RowTable, RunSamplers, restore
from leap_oper.networks import StackedMLP
from leap_oper.priorities import Priorities, advantage_weights
from leap_shared.checkpoints import check_finite
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError
from leap_shared.offline import Transitions, n_step, state_normalisation

__all__ = ["Advantages", "ValueFit", "iterate", "learning_rate", "oper_a"]


EVALUATION_ROWS = 16384


class Advantages(NamedTuple):
    """State values, one-step (or n-step) targets, and their difference, by the online networks."""

    v: Float[Tensor, "seeds rows"]
    q: Float[Tensor, "seeds rows"]
    adv: Float[Tensor, "seeds rows"]


def learning_rate(schedule: str, done: int, total: int, base: float = 3e-4) -> float:
    """Learning rate of the update after `done` of an iteration's `total` ones."""
    if schedule not in ("cosine", "linear", "none"):
        raise UserError(f"schedule {schedule!r}: use cosine, linear or none")
    share = done / total
    return base * {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "none": 1.0}[schedule]


class ValueFit:
    """Twin value networks s -> 256 -> 256 -> 1 of every seed, with slowly moving targets, in one batched program.

    The target is y = R + g min(V1', V2')(s_n): for `n_steps` = 1 R is the reward and g the discount, or 0 at terminals
    (time limits are bootstrapped through); for more it is the n-step return, and every end of an episode gives g = 0.

    Args:
        datasets: one per seed, of equal length; the same object for seeds that share it.
        seeds: of the initial weights.
        n_steps: rewards summed before the bootstrap.
        discount: per step.
        normalise: whether states are brought to mean 0 and deviation 1.
        reward_shift: added to every reward (-1 for AntMaze).
        hidden: width of both hidden layers.
        device: where to compute.

    Raises:
        UserError: numbers of data sets and seeds differ, or data sets have different lengths.
    """

    def __init__(
        self,
        datasets: Sequence[Transitions],
        seeds: Sequence[int],
        *,
        n_steps: int = 1,
        discount: float = 0.99,
        normalise: bool = True,
        reward_shift: float = 0.0,
        hidden: int = 256,
        device: str | torch.device = "cpu",
    ) -> None:
        lengths = {len(dataset) for dataset in datasets}
        if len(lengths) != 1 or len(datasets) != len(seeds):
            raise UserError(
                f"{len(seeds)} seeds and {len(datasets)} data sets of lengths {sorted(lengths)}: "
                "expected one data set per seed, all equally long"
            )
        (self.num_rows,) = lengths
        self.device, self.seeds = torch.device(device), list(seeds)
        data_sets = [dataset.fingerprint for dataset in datasets]
        self.settings = [data_sets, self.seeds, n_steps, discount, normalise, reward_shift, hidden]
        self._width = width = datasets[0].observations.shape[1]

        def columns(data: Transitions) -> Tensor:
            rewards = data.rewards + np.float32(reward_shift)
            if n_steps == 1:
                returns, after, going = rewards, data.next_observations, ~data.terminals
            else:
                longest = int(np.diff(np.flatnonzero(data.ends), prepend=-1).max())
                if n_steps > longest:
                    warnings.warn(f"n_steps={n_steps} is more than the longest episode, {longest} rows", stacklevel=2)
                returns, done, after = n_step(rewards, data.next_observations, data.ends, discount, n_steps)
                going = ~done
            mean, std = state_normalisation(data.observations) if normalise else (np.float32(0), np.float32(1))
            gain = np.float32(discount**n_steps) * going
            parts = ((data.observations - mean) / std, (after - mean) / std, returns[:, None], gain[:, None])
            return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

        self._table = RowTable(datasets, columns, self.device)
        self.value = StackedMLP((width, hidden, hidden, 1), [2 * s + head for s in seeds for head in (0, 1)])
        self.value.to(self.device)
        self.target = copy.deepcopy(self.value).requires_grad_(requires_grad=False)
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Adam:
        """Start Adam afresh, as every iteration does; the networks stay."""
        self.optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4, fused=True)
        return self.optimizer

    def _columns(self, indices: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self._table.gather(indices), [self._width, self._width, 1, 1], dim=-1)

    def _heads(self, network: StackedMLP, states: Tensor) -> Float[Tensor, "seeds 2 batch"]:
        both: Tensor = network(states.repeat_interleave(2, dim=0))
        return both.reshape(len(self.seeds), 2, -1)

    def update(self, indices: Int64[Tensor, "seeds batch"], rate: float) -> tuple[Tensor, Tensor]:
        """One update on the given rows.

        Returns:
            The loss of each seed and the mean value (seeds, 2) of each network, before the update.
        """
        states, after, returns, gain = torch.split(
            self._table.gather(indices), [self._width, self._width, 1, 1], dim=-1
        )
        with torch.no_grad():
            ahead = self._heads(self.target, after).amin(dim=1, keepdim=True)
            goal = returns.mT + gain.mT * ahead
        values = self._heads(self.value, states)
        loss = (values - goal).square().mean(dim=-1).sum(dim=1)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss.sum())
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.value.parameters(), strict=True):
                slow.lerp_(fast, 0.005)
        return loss.detach(), values.detach().mean(dim=-1)

    @torch.no_grad()
    def advantages(self) -> Advantages:
        """Of all rows."""
        blocks: list[tuple[Tensor, Tensor]] = []
        for start in range(0, self.num_rows, EVALUATION_ROWS):
            rows = torch.arange(start, min(start + EVALUATION_ROWS, self.num_rows), device=self.device)
            states, after, returns, gain = self._columns(rows.expand(len(self.seeds), -1))
            ahead = self._heads(self.value, after).amin(dim=1)
            blocks.append((self._heads(self.value, states).amin(dim=1), returns[..., 0] + gain[..., 0] * ahead))
        v, q = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        return Advantages(v, q, q - v)


def iterate(
    fit: ValueFit,
    *,
    iters: int = 5,
    steps: int = 1_000_000,
    first_steps: int | None = None,
    batch_size: int = 256,
    schedule: str = "cosine",
    scale_std: float | None = None,
    scale_eps: float = 0.1,
    every: int = 500,
    out: Path | None = None,
    progress: Callable[[int], object] | None = None,
) -> Float64[np.ndarray, "seeds iterations rows"]:
    """Weights of every iteration: fit the values on batches drawn by the last weights, then reweigh by the advantages.

    Args:
        fit: the networks, which are trained further.
        iters: iterations K; the first draws uniformly.
        steps: updates of an iteration; `first_steps` (if given) of the first.
        first_steps: see `steps`.
        batch_size: rows per seed and update.
        schedule: of the learning rate within an iteration.
        scale_std: see :func:`leap_oper.priorities.advantage_weights`, as `scale_eps`.
        scale_eps: floor after stretching.
        every: updates between two checkpoints.
        out: folder of checkpoints; a killed call goes on from the last one, to the same bits on CPU.
        progress: called with the number of updates done.

    Raises:
        UserError: a loss is not finite, an iteration without updates, or `out` belongs to another run.
    """
    budget = [steps if k or first_steps is None else first_steps for k in range(iters)]
    if iters < 1 or min(budget) < 1:
        raise UserError(f"iters={iters}, steps={steps}, first_steps={first_steps}: each must be at least 1")
    samplers = RunSamplers(fit.seeds, fit.device)
    uniform = np.ones((len(fit.seeds), 1, fit.num_rows))
    settings = [*fit.settings, budget, batch_size, schedule, scale_std, scale_eps, every]
    objects: dict[str, Any] = {"settings": settings, "weights": uniform, "value": fit.value, "target": fit.target}
    objects |= {f"generator{i}": generator for i, generator in enumerate(samplers.generators)}
    objects |= {"optimizer": fit.optimizer}
    folder, done = restore(out, objects)
    weights: NDArray[np.float64] = objects["weights"]
    if progress is not None:
        progress(done)
    for iteration in range(iters):
        begin = sum(budget[:iteration])
        end = begin + budget[iteration]
        if done >= end:
            continue
        samplers.use(list(weights[:, -1]))
        if done == begin:
            objects["optimizer"] = fit.new_optimizer()
        while done < end:
            block = samplers.draw(min(every, end - done), batch_size)
            for offset, indices in enumerate(block):
                rate = learning_rate(schedule, done - begin + offset, end - begin)
                loss, _ = fit.update(indices, rate)
            done += len(block)
            check_finite(loss.sum(), done, folder)
            if done == end:
                advantages = fit.advantages().adv.cpu().numpy()
                new = advantage_weights(weights[:, -1], advantages, scale_std, scale_eps)
                weights = np.concatenate([weights, new[:, None]], axis=1)
            if folder is not None:
                folder.save(done, {**objects, "weights": weights})
            if progress is not None:
                progress(len(block))
    if folder is not None:
        folder.close()
    return weights[:, 1:]


def oper_a(
    dataset: Transitions,
    iters: int = 5,
    steps: int = 1_000_000,
    n_step: int = 1,
    seeds: Sequence[int] = (1, 2, 3),
    device: str = "auto",
    *,
    reward_shift: float = 0.0,
    discount: float = 0.99,
    **options: Any,
) -> Priorities:
    """Priorities from advantages (OPER-A), all seeds in one batched program: weights (seeds, iterations, rows).

    ``oper_a(data).at(iteration=5).ensemble("mean").rescale(std=2.0, eps=0.1)`` is the authors' recipe for MuJoCo.
    Further `options` are those of :func:`iterate`: batch_size, schedule, out, progress and the rest.

    Raises:
        UserError: as :class:`ValueFit` and :func:`iterate`.
    """
    fit = ValueFit(
        [dataset] * len(seeds),
        seeds,
        n_steps=n_step,
        discount=discount,
        reward_shift=reward_shift,
        device=resolve_device(device),
    )
    weights = iterate(fit, iters=iters, steps=steps, **options)
    meta = {"method": "oper_a", "seeds": list(seeds), "steps": steps, "n_step": n_step, "discount": discount}
    return Priorities(weights, {**meta, "reward_shift": reward_shift, "fingerprint": dataset.fingerprint})
