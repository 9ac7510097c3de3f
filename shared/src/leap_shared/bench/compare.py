"""Contenders timed in turn, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from leap_shared.bench.contenders import Child, Local, Remote
from leap_shared.errors import UserError, did_you_mean

__all__ = ["Case", "Row", "compare", "ratio_interval"]


Contender = Callable[[], object] | Remote


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured against what.

    Attributes:
        name: of the case, with its sizes.
        ours: the callable to judge; it takes nothing.
        peers: the others, by name.
        target: the least ratio (peer's time / our time) to reach, for all peers or by peer.
        dtype: told in the row.
    """

    name: str
    ours: Contender
    peers: Mapping[str, Contender]
    target: Mapping[str, float] | float | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.peers:
            raise UserError(f"case {self.name!r} has no peer: give at least one callable to compare with")
        for name in self.target if isinstance(self.target, Mapping) else ():
            if name not in self.peers:
                raise UserError(f"case {self.name!r} has a target for {name!r}: {did_you_mean(name, self.peers)}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One case against one peer. Times are medians over the rounds; ratio above 1: ours is faster."""

    case: str
    device: str
    threads: int
    dtype: str
    ours_ms: float
    peer: str
    peer_ms: float
    ratio: float
    interval: tuple[float, float]
    target: float | None
    met: bool | None
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values; what is not in the common interface stands under "details"."""
        return {**vars(self), "interval": list(self.interval), "details": dict(self.details)}


def compare(
    cases: Iterable[Case],
    *,
    device: torch.device | str = "cpu",
    threads: int = 1,
    min_seconds: float = 0.02,
    rounds: int = 30,
    warmup: int = 3,
    seed: int = 0,
    progress: Callable[..., Iterable[int]] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time each case's contenders: in every round each runs once, in shuffled order.

    Args:
        cases: a generator builds each case when its turn comes, so that one alone takes memory.
        device: where the callables compute.
        threads: of PyTorch on the CPU, set inside and restored.
        min_seconds: of one contender in one round; the number of calls is calibrated for it.
        rounds: measurements per contender.
        warmup: calls before anything is timed.
        seed: of the order and the bootstrap.
        progress: called as ``progress(range(rounds), description=name)``, such as a command's ``context.progress``.
        timer: the clock in seconds, for CPU contenders in this process.

    Returns:
        One row per case and peer. `details` holds the number of `rounds` and, by contender, `iqr_ms` (first and third
        quartile), `iterations` per round, and `peak_memory_mb` and `gflop` of one call (None where unknown).

    Raises:
        UserError: a number is out of range.
        RuntimeError: a child process ended; what a callable raises comes through as it is.
    """
    least = {"threads": (threads, 1), "rounds": (rounds, 2), "warmup": (warmup, 1), "min_seconds": (min_seconds, 1e-6)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise UserError(f"{name} is {value}: give at least {bound}")
    generator = np.random.default_rng(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    try:
        for case in cases:
            with contextlib.ExitStack() as stack:
                runners: list[Local | Child] = [
                    stack.enter_context(Child.started(contender, str(device), threads))
                    if isinstance(contender, Remote)
                    else Local(contender, str(device), timer)
                    for contender in (case.ours, *case.peers.values())
                ]
                for runner in runners:
                    runner.time(warmup)
                iterations = [_calibrate(runner, min_seconds) for runner in runners]
                seconds = np.empty((len(runners), rounds))
                for turn in progress(range(rounds), description=case.name) if progress else range(rounds):
                    for index in generator.permutation(len(runners)):
                        seconds[index, turn] = runners[index].time(iterations[index])
                facts = [{"iterations": n, **runner.facts()} for n, runner in zip(iterations, runners, strict=True)]
            rows += _rows(case, str(device), threads, seconds, facts, generator)
    finally:
        torch.set_num_threads(before)
    return rows


def _rows(
    case: Case,
    device: str,
    threads: int,
    seconds: Float[np.ndarray, "contenders rounds"],
    facts: list[dict[str, Any]],
    generator: np.random.Generator,
) -> Iterator[Row]:
    medians = (1e3 * np.median(seconds, axis=1)).tolist()
    for fact, quartiles in zip(facts, 1e3 * np.quantile(seconds, [0.25, 0.75], axis=1).T, strict=True):
        fact["iqr_ms"] = quartiles.tolist()
    for index, peer in enumerate(case.peers, start=1):
        ratio = medians[index] / medians[0]
        interval = ratio_interval(seconds[0], seconds[index], generator)
        target = case.target.get(peer) if isinstance(case.target, Mapping) else case.target
        met = None if target is None else ratio >= target
        details = {key: {"ours": facts[0][key], "peer": facts[index][key]} for key in facts[0]}
        details["rounds"] = seconds.shape[1]
        numbers = (medians[0], peer, medians[index], ratio, interval, target, met)
        yield Row(case.name, device, threads, case.dtype, *numbers, details)


def ratio_interval(
    ours: Float[np.ndarray, " rounds"],
    peer: Float[np.ndarray, " rounds"],
    generator: np.random.Generator,
    resamples: int = 2000,
) -> tuple[float, float]:
    """95% interval of median(peer) / median(ours): percentile bootstrap over rounds, both from the same rounds."""
    chosen = generator.integers(len(ours), size=(resamples, len(ours)))
    ratios = np.median(peer[chosen], axis=1) / np.median(ours[chosen], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    return low, high


def _calibrate(runner: Local | Child, min_seconds: float) -> int:
    """Number of calls that take at least `min_seconds`, a power of two."""
    iterations = 1
    while iterations < 1 << 24 and iterations * runner.time(iterations) < min_seconds:
        iterations *= 2
    return iterations
