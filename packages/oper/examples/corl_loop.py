"""A TD3+BC loop as CORL's single files have it, whose ReplayBuffer is replaced by an import and two arguments.

A point on a line gets -|position| at each step and moves by its action, with noise. Three episodes in ten steer to the
origin (action = -position), the others wander about. The critic's batches are uniform.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import leap_oper as lo
from leap_oper.integrations.corl import ReplayBuffer

EPISODES, STEPS, NOISE = 200, 20, 0.05


def walks(random: np.random.Generator) -> dict[str, Any]:
    """What d4rl.qlearning_dataset gives such a script."""
    steer = random.random((EPISODES, 1)) < 0.3
    states = random.uniform(-2, 2, (EPISODES, 1))
    rows: dict[str, Any] = {"observations": [], "actions": [], "next_observations": []}
    for _ in range(STEPS):
        actions = np.where(steer, np.clip(-states, -1, 1), random.uniform(-1, 1, states.shape))
        after = states + actions + NOISE * random.standard_normal(states.shape)
        for key, value in zip(rows, (states, actions, after), strict=True):
            rows[key].append(value)
        states = after
    arrays: dict[str, Any] = {key: np.stack(value, axis=1).reshape(-1, 1) for key, value in rows.items()}
    return arrays | {"rewards": -np.abs(arrays["next_observations"]), "terminals": np.zeros(EPISODES * STEPS)}


def train(buffer: ReplayBuffer, updates: int, *, decouple: bool) -> nn.Module:
    """The actor; it sees prioritised batches if decoupled."""
    actor = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1), nn.Tanh())
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    both = nn.ModuleList([actor, critic])
    slow_actor, slow_critic = slow = copy.deepcopy(both)
    adam = torch.optim.Adam(both.parameters(), 3e-3)
    for _ in range(updates):
        states, actions, rewards, after, dones = buffer.sample(256, uniform=True)
        y = rewards + 0.9 * (1 - dones) * slow_critic(torch.cat([after, slow_actor(after)], 1))
        critic_loss = F.mse_loss(critic(torch.cat([states, actions], 1)), y.detach())
        states, actions, *_ = buffer.sample(256, uniform=not decouple)
        values = critic.requires_grad_(False)(torch.cat([states, actor(states)], 1))
        critic.requires_grad_(True)  # the critic learns from its own loss alone
        actor_loss = F.mse_loss(actor(states), actions) - 0.5 * values.mean() / values.abs().mean().detach()
        adam.zero_grad()
        (critic_loss + actor_loss).backward()
        adam.step()
        for new, old in zip(both.parameters(), slow.parameters(), strict=True):
            old.data.lerp_(new.data, 0.005)
    return actor


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=500)
    updates, data = parser.parse_args().updates, walks(np.random.default_rng(0))
    ds, positions = lo.from_arrays(**data), torch.linspace(-2, 2, 9)[:, None]
    w = lo.oper_r(ds).rescale(std=2.0, eps=0.1)
    for name in ("uniform", "decoupled"):
        torch.manual_seed(0)
        buffer = ReplayBuffer(1, 1, len(ds), "cpu", priorities=w, dataset=ds)
        buffer.load_d4rl_dataset(data | {"rewards": 0.1 * data["rewards"]})
        actions = train(buffer, updates, decouple=name == "decoupled")(positions)
        print(f"{name:10s} mean distance from steering {(actions + positions.clamp(-1, 1)).abs().mean().item():.2f}")


if __name__ == "__main__":
    main()
