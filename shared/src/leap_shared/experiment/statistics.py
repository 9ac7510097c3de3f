"""Means and differences with Student-t 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Estimate", "difference", "mean", "t_quantile"]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Estimate:
    """A value and the 95% interval around it; `low` and `high` are infinite where one seed shows no spread."""

    value: float
    low: float
    high: float


@cache
def t_quantile(degrees: float, confidence: float = 0.95) -> float:
    """The t with P(`|T|` < t) = `confidence` for Student's T of `degrees` >= 1 degrees of freedom.

    With T = sqrt(degrees) tan(angle) the density is cos(angle)^(degrees - 1) up to a constant that the gamma function
    gives; Gauss-Legendre integrates it and bisection inverts it, to better than 1e-8.
    """
    constant = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))

    def coverage(t: float) -> float:
        half = math.atan(t / math.sqrt(degrees)) / 2
        return constant * half * float(WEIGHTS @ np.cos(half * (NODES + 1)) ** (degrees - 1))

    low, high = 0.0, 1.0
    while coverage(high) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if coverage(middle) < confidence else (low, middle)
    return (low + high) / 2


def _interval(value: float, error: float, degrees: float) -> Estimate:
    if degrees < 1:
        return Estimate(value, -math.inf, math.inf)
    reach = t_quantile(degrees) * error
    return Estimate(value, value - reach, value + reach)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent values with its t interval."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return _interval(float(np.mean(values)), error, float(count - 1))


def difference(method: Sequence[float], baseline: Sequence[float], *, paired: bool) -> Estimate:
    """Mean of method - baseline: pair by pair, or by Welch's interval for two independent groups."""
    if paired:
        return mean([ours - theirs for ours, theirs in zip(method, baseline, strict=True)])
    value = float(np.mean(method) - np.mean(baseline))
    sizes = np.array([len(method), len(baseline)])
    if sizes.min() < 2:
        return Estimate(value, -math.inf, math.inf)
    parts = np.array([np.var(method, ddof=1), np.var(baseline, ddof=1)]) / sizes
    total = float(parts.sum())
    degrees = total**2 / float((parts**2 / (sizes - 1)).sum()) if total > 0 else float(sizes.sum() - 2)
    return _interval(value, math.sqrt(total), degrees)
