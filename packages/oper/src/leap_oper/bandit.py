"""The authors' bandit toy: four clusters of actions, exact values, five iterations of OPER-A in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from leap_oper.priorities import advantage_weights
from leap_shared.errors import UserError

__all__ = ["PUBLISHED_REWARDS", "PUBLISHED_STDS", "Bandit", "BanditIteration", "bandit"]

PUBLISHED_REWARDS = (2.67, 3.75, 4.38, 4.71, 4.88)
PUBLISHED_STDS = (0.65, 1.58, 3.42, 7.18, 14.85)
CLUSTERS = (((0.6, 0.6), 5.0), ((0.6, -0.6), 1.0), ((-0.6, 0.6), 0.0), ((-0.6, -0.6), -2.0))
ROWS_PER_CLUSTER = 2500


@dataclass(frozen=True, eq=False)
class Bandit:
    """Actions in [-1, 1]² and their rewards."""

    actions: Float[np.ndarray, "rows 2"]
    rewards: Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class BanditIteration:
    """One iteration: mean reward under the weights, and the deviation of the products of factors they stand for."""

    iteration: int
    mean_reward: float
    published_mean_reward: float
    weight_std: float
    published_weight_std: float


def bandit(seed: int = 0) -> Bandit:
    """Draw the toy: 2500 actions of deviation 0.05 about each of (±0.6, ±0.6), rewards 5, 1, 0 or -2 ± 0.25."""
    random = np.random.default_rng(seed)
    actions = [random.normal(centre, 0.05, (ROWS_PER_CLUSTER, 2)) for centre, _ in CLUSTERS]
    rewards = [random.normal(reward, 0.25, ROWS_PER_CLUSTER) for _, reward in CLUSTERS]
    return Bandit(np.clip(np.concatenate(actions), -1, 1), np.concatenate(rewards))


def iterations(toy: Bandit, count: int = 5) -> list[BanditIteration]:
    """Iterations of OPER-A with exact values: V = Σ p r and A = r - V.

    The published deviations are those of the factors' product, each factor of mean 1, before the product itself is
    brought to mean 1; the probabilities are the same either way.

    Raises:
        UserError: more iterations than the five that are published.
    """
    if not 1 <= count <= len(PUBLISHED_REWARDS):
        raise UserError(f"{count} iterations: 1 to {len(PUBLISHED_REWARDS)} are published")
    weights = product = np.ones(len(toy.rewards))
    rows = []
    for k in range(count):
        advantage = toy.rewards - np.average(toy.rewards, weights=weights)
        product = product * advantage_weights(np.ones_like(product), advantage)
        weights = advantage_weights(weights, advantage)
        mean_reward = float(np.average(toy.rewards, weights=weights))
        published = PUBLISHED_REWARDS[k], PUBLISHED_STDS[k]
        rows.append(BanditIteration(k + 1, mean_reward, published[0], float(product.std()), published[1]))
    return rows
