"""TD3+BC of d3rlpy on uniform batches, on prioritised ones, and with only the actor's prioritised (decoupled).

A point on a line gets -|position| at each step and moves by its action, with noise. Three episodes in ten steer to the
origin, the others wander about: their returns say which is which.
"""

from __future__ import annotations

import argparse
from typing import Any

import d3rlpy
import numpy as np

import leap_oper as lo
from leap_oper.integrations.d3rlpy import dataset, decouple
from leap_shared.offline import Transitions

EPISODES, STEPS, NOISE = 200, 20, 0.05


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


def mean_return(algorithm: d3rlpy.algos.TD3PlusBC) -> float:
    """Of 100 episodes of the learnt policy."""
    random = np.random.default_rng(1)
    states, total = random.uniform(-2, 2, (100, 1)), 0.0
    for _ in range(STEPS):
        states = states + algorithm.predict(states.astype(np.float32)) + NOISE * random.standard_normal(states.shape)
        total -= float(np.abs(states).mean())
    return total


def main() -> None:
    """Train three times and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ds = walks(np.random.default_rng(arguments.seed))
    w = lo.oper_r(ds).rescale(std=2.0, eps=0.1)
    print(f"{len(ds)} rows; the weights' deviation is {w.std:.2f}, the effective sample {w.effective_sample_size:.0f}")
    for name in ("uniform", "prioritised", "decoupled"):
        d3rlpy.seed(arguments.seed)
        algorithm = d3rlpy.algos.TD3PlusBCConfig(alpha=0.5, actor_learning_rate=3e-3).create()
        data = dataset(ds, w, seed=arguments.seed)
        if name == "uniform":
            data = data.uniform()
        elif name == "decoupled":
            data = decouple(algorithm, data)
        algorithm.fit(
            data,
            n_steps=arguments.updates,
            n_steps_per_epoch=arguments.updates,
            show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        )
        print(f"{name:12s} mean return {mean_return(algorithm):6.2f}")


if __name__ == "__main__":
    main()
