"""Arithmetic of the released scripts: epochs of a stage, where a stage resumes, the learning rate of an iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["continuous_rate", "lr_schedule", "reference_rate", "resume_epoch", "stage_boundary", "stage_epochs"]


def stage_epochs(epochs: Number, base_size: int, size: int, replay: int = 1) -> int:
    """Epochs that the whole training would have at one stage's size: int(T * base^2 / size^2 / replay).

    The ratio of areas is one division of whole numbers; squaring the ratio of sides would lose epochs to rounding.
    """
    return int(epochs * (base_size * base_size / (size * size)) / replay)


def stage_boundary(total: Number, shares: Sequence[Number], index: int) -> int:
    """Epoch at which stage `index` ends, of `total` epochs in that stage's unit."""
    if len(set(shares)) == 1:
        return int(total / len(shares) * (index + 1))
    return int(round(total * math.fsum(shares[: index + 1]), 9))


def resume_epoch(done: int, size_before: int, size: int, replay_before: int = 1, replay: int = 1) -> int:
    """Epochs done, in the unit of a stage of another size and replay: rounded, halves to even, as the scripts do."""
    if replay != replay_before:
        done = round(done * replay_before / replay)
    return round(done * size_before**2 / size**2)


def reference_rate(
    step: Float64[np.ndarray, " steps"], base: Number, final: Number, steps: int, warmup: int
) -> Float64[np.ndarray, " steps"]:
    """Rates of iterations: a line from 0 to `base` over `warmup` of them, both ends included, then a cosine.

    Args:
        step: iterations, from 0.
        base: the largest rate.
        final: the rate that the cosine runs towards.
        steps: iterations of the whole schedule.
        warmup: iterations of the line.
    """
    line = np.where(step == warmup - 1, base, step * (base / max(warmup - 1, 1))) if warmup > 1 else np.zeros_like(step)
    cosine = np.cos(np.pi * (step - warmup) / max(steps - warmup, 1))
    return np.where(step < warmup, line, final + 0.5 * (base - final) * (1 + cosine))


def lr_schedule(
    base: Number,
    final: Number,
    epochs: int,
    iters_per_epoch: int,
    warmup_epochs: int = 0,
    warmup_steps: int = -1,
) -> NDArray[np.float64]:
    """Rate of every iteration by the released rule; `warmup_steps` above 0 takes the place of `warmup_epochs`.

    Raises:
        UserError: a number is negative, or the warm-up is longer than the schedule.
    """
    steps = epochs * iters_per_epoch
    warmup = warmup_steps if warmup_steps > 0 else warmup_epochs * iters_per_epoch
    if epochs < 0 or iters_per_epoch < 1 or warmup_epochs < 0:
        given = f"epochs {epochs}, iters_per_epoch {iters_per_epoch}, warmup_epochs {warmup_epochs}"
        raise UserError(f"{given}: expected 0 or more, 1 or more, 0 or more")
    if warmup > steps:
        raise UserError(f"a warm-up of {warmup} iterations is longer than the schedule of {steps}: shorten it")
    return reference_rate(np.arange(steps, dtype=np.float64), base, final, steps, warmup)


def continuous_rate(progress: Number, warmup: Number, base: Number, final: Number, kind: str = "cosine") -> float:
    """Rate at a point of the training: a line up to the share `warmup` of it, then a cosine, a line, or a constant.

    Args:
        progress: share of the compute that is spent, 0 to 1.
        warmup: share of the compute in which the rate rises.
        base: the largest rate.
        final: the last rate, where it falls.
        kind: cosine, linear or constant.
    """
    if progress < warmup:
        return base * progress / warmup
    left = 1 - (progress - warmup) / (1 - warmup)
    shape = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[kind]
    return final + (base - final) * shape
