"""What `leap-oper bench` measures: samplers beside each other, and several runs in one program beside one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from leap_oper.advantages import ValueFit
from leap_oper.behaviour_cloning import BehaviourCloning, Run
from leap_oper.samplers import AliasSampler, CdfSampler
from leap_shared.bench import Case, compare, write
from leap_shared.cli import Context
from leap_shared.offline import Transitions

__all__ = ["run"]

BATCH, SEEDS = 256, 5


def run(rows: int, threads: int, context: Context) -> list[dict[str, Any]]:
    """Measure, write the table beside the command's config, and return the rows."""
    measured = compare(
        _cases(rows, context.seed, context.device), device=context.device, threads=threads, progress=context.progress
    )
    write(measured, context.out, "oper")
    return [row.to_json() for row in measured]


def _cases(rows: int, seed: int, device: torch.device) -> Iterator[Case]:
    random = np.random.default_rng(seed)
    probs = random.gamma(2.0, size=rows)
    probs /= probs.sum()
    alias, cdf = AliasSampler(probs, device), CdfSampler(probs, device)
    peers: dict[str, Any] = {
        "cumulative sum": lambda: cdf.draw((BATCH,)),
        "numpy choice": lambda: random.choice(rows, BATCH, p=probs),
    }
    if rows < 1 << 24:  # torch.multinomial takes no more
        weights = torch.as_tensor(probs, device=device)
        peers["torch.multinomial"] = lambda: torch.multinomial(weights, BATCH, replacement=True)
    name = f"draw {BATCH} of {rows:,} rows, alias"
    yield Case(name, lambda: alias.draw((BATCH,)), peers, target=1.0, dtype="float64")

    data = _data(random)
    together = BehaviourCloning([Run(data, s) for s in range(SEEDS)], device=device)
    apart = [BehaviourCloning([Run(data, s)], device=device) for s in range(SEEDS)]
    indices = torch.randint(len(data), (SEEDS, BATCH), device=device)

    def clone_apart() -> None:
        for one, batch in zip(apart, indices, strict=True):
            one.update(batch[None])

    name = f"behaviour cloning update, {SEEDS} seeds, 17 states, 6 actions, 128-128"
    yield Case(name, lambda: together.update(indices), {f"{SEEDS} single runs": clone_apart}, target=1.3)

    fit = ValueFit([data] * SEEDS, range(SEEDS), device=device)
    fits = [ValueFit([data], [s], device=device) for s in range(SEEDS)]

    def fit_apart() -> None:
        for one, batch in zip(fits, indices, strict=True):
            one.update(batch[None], 3e-4)

    name = f"OPER-A value update, {SEEDS} seeds, 17 states, twin 256-256"
    yield Case(name, lambda: fit.update(indices, 3e-4), {f"{SEEDS} single runs": fit_apart}, target=None)


def _data(random: np.random.Generator, rows: int = 50_000) -> Transitions:
    states = random.standard_normal((rows, 17))
    actions = random.uniform(-1, 1, (rows, 6))
    return Transitions.from_arrays(states, actions, random.standard_normal(rows), states, np.zeros(rows))
