"""Priorities in torchrl: uniform, resampled and reweighted batches of one storage, and a policy cloned from each.

A point on a line gets -|position| at each step and moves by its action, with noise. Three episodes in ten steer to the
origin (action = -position), the others wander about. The clone of uniform batches is the average of both.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torchrl.data import TensorDictReplayBuffer

import leap_oper as lo
from leap_oper.integrations import torchrl
from leap_shared.offline import Transitions

EPISODES, STEPS, NOISE = 200, 20, 0.3


def walks(random: np.random.Generator) -> Transitions:
    """Recorded episodes, episode after episode."""
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
    rewards, timeouts = -np.abs(arrays["next_observations"]), np.arange(EPISODES * STEPS) % STEPS == STEPS - 1
    return lo.from_arrays(**arrays, rewards=rewards, terminals=np.zeros(len(rewards)), timeouts=timeouts)


def clone(buffer: TensorDictReplayBuffer, updates: int, *, reweight: bool) -> tuple[float, float]:
    """The clone's action at position 0.5, and the mean reward of the rows that it saw."""
    torch.manual_seed(0)
    policy = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1), torch.nn.Tanh())
    adam, rewards = torch.optim.Adam(policy.parameters(), 1e-2), []
    for _ in range(updates):
        batch = buffer.sample()
        errors = (policy(batch["observation"]) - batch["action"]).square().mean(dim=1)
        adam.zero_grad()
        (errors * batch["_weight"] if reweight else errors).mean().backward()
        adam.step()
        rewards.append(batch["next", "reward"].mean().item())
    return policy(torch.tensor([[0.5]])).item(), float(np.mean(rewards))


def main() -> None:
    """Clone three times and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    updates, ds = parser.parse_args().updates, walks(np.random.default_rng(0))
    w = lo.oper_r(ds).rescale(std=2.0, eps=0.1)
    resampled = torchrl.replay_buffer(ds, w, batch_size=256)
    draw = torchrl.sampler(w, uniform=True)
    uniform = TensorDictReplayBuffer(storage=resampled.storage, sampler=draw, batch_size=256)
    for name, buffer in (("uniform", uniform), ("resampled", resampled), ("reweighted", uniform)):
        action, reward = clone(buffer, updates, reweight=name == "reweighted")
        print(f"{name:10s} mean reward of its rows {reward:5.2f}, action at 0.5 {action:+.2f} (steering: -0.50)")


if __name__ == "__main__":
    main()
