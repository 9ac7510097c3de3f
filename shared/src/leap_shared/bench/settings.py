"""Benchmarks in named parts: with how many threads, rounds and seconds each is measured."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from leap_shared.bench.compare import Case, Row, compare
from leap_shared.cli import Context
from leap_shared.errors import UserError, did_you_mean

__all__ = ["QUICK", "BenchmarkSettings", "file_name"]

QUICK: dict[str, Any] = {"rounds": 2, "warmup": 1, "min_seconds": 1e-6, "smoke": True}
"""Settings of a trial that only shows that everything runs."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What is measured, and how long; a package adds its shapes and models, and calls `check` with its parts."""

    parts: tuple[str, ...] = ()
    """Names of parts; all where none is given."""
    threads: tuple[int, ...] = (1, 0)
    """Numbers of CPU threads, one after the other; 0 is what PyTorch takes by itself. On a GPU the first counts."""
    rounds: int = 15
    warmup: int = 3
    min_seconds: float = 0.02
    """Least time of one contender in one round."""
    smoke: bool = False
    """Whether this only shows that everything runs: no row has a target."""

    def check(self, known: Collection[str]) -> None:
        """Refuse what cannot be measured.

        Args:
            known: names of all parts.

        Raises:
            UserError: a part is unknown, or a number is out of range.
        """
        for name in self.parts:
            if name not in known:
                raise UserError(f"part {name!r} is unknown: {did_you_mean(name, known)}")
        if self.rounds < 2:
            raise UserError(f"rounds {self.rounds}: expected 2 or more, for an interval")
        if not self.threads or min(self.threads) < 0:
            given = ", ".join(map(str, self.threads)) or "none"
            raise UserError(f"threads {given}: expected numbers of 1 or more, or 0 for all")

    def thread_counts(self, device: torch.device) -> list[int]:
        """Numbers of threads to measure with, each once: all that are asked for on a CPU, the first on a GPU.

        Raises:
            UserError: the device is neither a CPU nor a CUDA device.
        """
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"device {device} cannot be timed: give --device cpu or cuda")
        counts = list(dict.fromkeys(count or torch.get_num_threads() for count in self.threads))
        return counts if device.type == "cpu" else counts[:1]

    def measure(self, cases: Iterable[Case], context: Context, threads: int, few: int | None = None) -> list[Row]:
        """Time the cases: `compare` with these settings. Targets are for the real sizes, and on a CPU for one thread.

        Args:
            cases: a generator builds each when its turn comes.
            context: of the command, for its device, seed and progress.
            threads: of PyTorch.
            few: the most rounds, after one call that warms up, for cases whose calls take seconds.
        """
        if self.smoke or (threads > 1 and context.device.type == "cpu"):
            cases = (replace(case, target=None) for case in cases)
        return compare(
            cases,
            device=context.device,
            threads=threads,
            min_seconds=self.min_seconds,
            rounds=min(self.rounds, few or self.rounds),
            warmup=1 if few else self.warmup,
            seed=context.seed,
            progress=context.progress,
            timer=time.thread_time if threads == 1 else time.perf_counter,  # its own, not the machine's
        )


def file_name(part: str, threads: int, device: torch.device) -> str:
    """Name of a part's files: one of its own for every number of CPU threads but 1."""
    return part if threads == 1 or device.type != "cpu" else f"{part}-{threads}-threads"
