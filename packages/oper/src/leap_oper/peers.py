"""What the package is measured beside: d3rlpy, and the loops that an ordinary script would hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from leap_shared.offline import Transitions

__all__ = ["EagerTD3BC", "EagerValueFit", "d3rlpy_updates", "row_by_row"]

D3RLPY = {"bc": "BCConfig", "td3bc": "TD3PlusBCConfig", "iql": "IQLConfig", "cql": "CQLConfig"}


def d3rlpy_updates(name: str, data: Transitions, batch_size: int) -> Callable[[int], None]:
    """Updates of one of d3rlpy's algorithms on its own batches, with its default networks of 256-256."""
    import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))  # errors alone
    columns = (data.observations, data.actions, data.rewards[:, None], data.terminals.astype(np.float32))
    cut = (data.ends & ~data.terminals).astype(np.float32)
    buffer = d3rlpy.dataset.MDPDataset(*columns, timeouts=cut)
    algorithm = getattr(d3rlpy.algos, D3RLPY[name])(batch_size=batch_size).create(device="cpu")
    algorithm.build_with_dataset(buffer)

    def run(count: int) -> None:
        for _ in range(count):
            algorithm.update(buffer.sample_transition_batch(batch_size))

    return run


def _network(widths: tuple[int, ...]) -> nn.Sequential:
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _follow(target: nn.Module, online: nn.Module) -> None:
    for slow, own in zip(target.parameters(), online.parameters(), strict=True):
        slow.data.copy_(0.005 * own.data + 0.995 * slow.data)


class EagerTD3BC:
    """TD3+BC as a single-file script holds it: modules, autograd, Adam as it comes, random rows of tensors."""

    def __init__(self, data: Transitions, batch_size: int) -> None:
        columns = (data.observations, data.actions, data.rewards, data.next_observations, 1 - data.terminals)
        self.data, self.batch_size = [torch.tensor(column, dtype=torch.float32) for column in columns], batch_size
        width, action = data.observations.shape[1], data.actions.shape[1]
        self.actor = _network((width, 256, 256, action))
        self.critics = nn.ModuleList(_network((width + action, 256, 256, 1)) for _ in range(2))
        self.actor_target, self.critic_targets = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=3e-4)
        self.calls = 0

    def update(self) -> None:
        """One update."""
        self.calls += 1
        rows = torch.randint(len(self.data[0]), (self.batch_size,))
        states, actions, rewards, after, going = (column[rows] for column in self.data)
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(actions)).clamp(-0.5, 0.5)
            inputs = torch.cat([after, (self.actor_target(after).tanh() + noise).clamp(-1, 1)], 1)
            ahead = torch.min(*(critic(inputs) for critic in self.critic_targets)).squeeze(1)
            goal = rewards + 0.99 * going * ahead
        inputs = torch.cat([states, actions], 1)
        losses = [F.mse_loss(critic(inputs).squeeze(1), goal) for critic in self.critics]
        self.critic_optimizer.zero_grad()
        torch.autograd.backward(losses[0] + losses[1])
        self.critic_optimizer.step()
        if self.calls % 2 == 0:
            policy = self.actor(states).tanh()
            values = self.critics[0](torch.cat([states, policy], 1))
            loss = F.mse_loss(policy, actions) - 2.5 / values.abs().mean().detach() * values.mean()
            self.actor_optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.actor_optimizer.step()
            _follow(self.critic_targets, self.critics)
            _follow(self.actor_target, self.actor)


class EagerValueFit:
    """OPER-A's value fitting for one seed in eager PyTorch: modules, autograd, Adam as it comes, a loop for Polyak.

    Args:
        states: (rows, width).
        next_states: (rows, width).
        rewards: (rows, 1).
        not_terminal: (rows, 1), 0 or 1.
        updates: of the cosine schedule.
    """

    def __init__(
        self, states: Tensor, next_states: Tensor, rewards: Tensor, not_terminal: Tensor, updates: int = 1_000_000
    ) -> None:
        self.states, self.next_states, self.rewards, self.not_terminal = states, next_states, rewards, not_terminal
        self.values = nn.ModuleList(_network((states.shape[1], 256, 256, 1)) for _ in range(2))
        self.targets = copy.deepcopy(self.values)
        self.optimizer = torch.optim.Adam(self.values.parameters(), lr=3e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, updates)

    def update(self, indices: Tensor) -> Tensor:
        """One update on the rows `indices` (batch,); returns the loss before it."""
        states, next_states = self.states[indices], self.next_states[indices]
        with torch.no_grad():
            ahead = torch.min(*(target(next_states) for target in self.targets))
            goal = self.rewards[indices] + 0.99 * self.not_terminal[indices] * ahead
        first, second = (F.mse_loss(value(states), goal) for value in self.values)
        self.optimizer.zero_grad()
        torch.autograd.backward(first + second)
        self.optimizer.step()
        _follow(self.targets, self.values)
        self.schedule.step()
        return (first + second).detach()


def row_by_row(path: Any) -> NDArray[np.float64]:
    """OPER-R's weights of a D4RL file with timeouts, by loops over rows."""
    import h5py

    with h5py.File(path) as file:
        raw = {key: file[key][()] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    kept = [row for row in range(len(raw["rewards"]) - 1) if not raw["timeouts"][row]]
    data = [
        tuple(raw[key][row + shift] for key, shift in (("observations", 0), ("actions", 0), ("observations", 1)))
        for row in kept
    ]
    returns, total, start = np.zeros(len(kept)), 0.0, 0
    for row, place in enumerate(kept):
        total += raw["rewards"][place]
        last = row + 1 == len(kept)
        if last or raw["terminals"][place] or np.linalg.norm(data[row + 1][0] - data[row][2]) > 1e-6:
            returns[start : row + 1], total, start = total, 0.0, row + 1
    share = (returns - returns.min()) / (returns.max() - returns.min())
    return np.asarray(share / share.mean())
