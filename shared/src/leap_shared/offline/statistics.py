"""Scores of few runs, told honestly: interquartile mean, stratified bootstrap, probability of improvement.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from leap_shared.errors import UserError
from leap_shared.experiment.statistics import Estimate

__all__ = ["bootstrap", "interquartile_mean", "probability_of_improvement"]

RESAMPLES = 10_000
BLOCK = 1000

Scores = Float64[np.ndarray, "_ _"]
"""Runs (rows, as many as there are) x tasks."""
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def interquartile_mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the middle half of all scores of the last two axes (runs, tasks); the quartiles are cut as SciPy does."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return np.asarray(flat[..., cut : flat.shape[-1] - cut].mean(axis=-1))


def _checked(scores: Scores) -> Scores:
    if not scores.size or not np.isfinite(scores).all():
        raise UserError(f"scores of shape {scores.shape} are empty or not finite: give runs x tasks finite numbers")
    return scores


def _resampled(scores: Scores, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` tables whose runs are drawn with replacement, task by task (the strata)."""
    rows = generator.integers(len(scores), size=(count, *scores.shape))
    return np.take_along_axis(scores[None], rows, axis=1)


def _blocks(resamples: int) -> list[int]:
    return [min(BLOCK, resamples - done) for done in range(0, resamples, BLOCK)]


def bootstrap(
    scores: Scores, statistic: Statistic = interquartile_mean, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A statistic of all runs and its percentile interval (95%) by the stratified bootstrap; one run shows no spread.

    Args:
        scores: one row per run; every task is a stratum.
        statistic: of the last two axes.
        resamples: tables drawn.
        seed: of the draws.

    Raises:
        UserError: scores are missing or not finite.
    """
    generator = np.random.default_rng(seed)
    scores = _checked(scores)
    drawn = np.concatenate([statistic(_resampled(scores, generator, n)) for n in _blocks(resamples)])
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if len(scores) > 1 else (-np.inf, np.inf)
    return Estimate(float(statistic(scores)), low, high)


def probability_of_improvement(ours: Scores, theirs: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """P(a run of ours scores more than one of theirs) + half of P(equal), averaged over tasks, with its interval.

    Raises:
        UserError: numbers of tasks differ, or scores are missing or not finite.
    """
    if ours.shape[1:] != theirs.shape[1:]:
        raise UserError(f"scores of {ours.shape[1:]} and {theirs.shape[1:]} tasks: give the same tasks for both")
    generator = np.random.default_rng(seed)
    ours, theirs = _checked(ours), _checked(theirs)

    def wins(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        sign = np.sign(x[..., :, None, :] - y[..., None, :, :])
        return np.asarray((0.5 * (sign + 1)).mean(axis=(-3, -2, -1)))

    pairs = [(_resampled(ours, generator, n), _resampled(theirs, generator, n)) for n in _blocks(resamples)]
    low, high = np.quantile(np.concatenate([wins(x, y) for x, y in pairs]), [0.025, 0.975]).tolist()
    low, high = (low, high) if min(len(ours), len(theirs)) > 1 else (0.0, 1.0)
    return Estimate(float(wins(ours, theirs)), low, high)
