"""The command `leap-oper`: verbs, no logic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from leap_shared.cli import App, Command, Context
from leap_shared.errors import UserError


@dataclass(frozen=True)
class Demo(Command):
    """Clone behaviour from PointMaze data with and without priorities; writes section.html and its figures.

    Takes about two minutes on two cores. Killed, it goes on from where it was when started again.

    Examples:
        leap-oper demo --seeds 5 --out runs/demo
    """

    seeds: int = 5
    """How many seeds; each makes its own data set and its own policies. The first is --seed."""
    quick: bool = False
    """A smoke test of ten seconds with two seeds: shows that everything runs, says nothing about the claim."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        from leap_oper import demo

        seeds = tuple(range(self.seed, self.seed + self.seeds))
        settings = demo.Settings.quick(self.seed) if self.quick else demo.Settings(seeds=seeds)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)


@dataclass(frozen=True)
class WeightsR(Command):
    """Priorities from returns (OPER-R) of a data set in an .npz file; writes weights.npz.

    The file holds observations, actions, rewards, next_observations, terminals and, if known, timeouts.

    Examples:
        leap-oper weights r data.npz --base-prob 0.2 --out runs/weights
    """

    verb: ClassVar[str] = "weights r"

    data: Annotated[Path, tyro.conf.Positional]
    """The .npz file."""
    base_prob: float = 0.0
    """Added to each episode's share before normalising; 0 never draws the worst episodes."""
    variant: Literal["return", "inverse", "reward"] = "return"
    """What is preferred: high returns, low returns, or each row's own reward."""

    def run(self, context: Context) -> object:
        """Compute and save the weights."""
        from leap_oper import oper_r
        from leap_shared.offline import Transitions

        dataset, _ = Transitions.load(self.data)
        priorities = oper_r(dataset, self.base_prob, self.variant)
        priorities.save(context.out / "weights.npz")
        return {
            "rows": len(dataset),
            "episodes": int(dataset.ends.sum()),
            "weight std": priorities.std,
            "largest weight": float(priorities.weights.max()),
            "effective sample size": priorities.effective_sample_size,
            "written": str(context.out / "weights.npz"),
        }


@dataclass(frozen=True)
class Bench(Command):
    """Measure the samplers and the batched trainers beside their peers; one thread, interleaved.

    Examples:
        leap-oper bench --json
    """

    rows: int = 1_000_000
    """Rows that the samplers draw from."""
    threads: int = 1
    """Threads of PyTorch."""

    def run(self, context: Context) -> object:
        """Measure."""
        from leap_oper import benchmark

        if self.rows < 1000:
            raise UserError(f"rows is {self.rows}: give at least 1000")
        return benchmark.run(self.rows, self.threads, context)


app = App(name="leap-oper", package="leap_oper", commands=(Demo, WeightsR, Bench))


def main() -> None:
    """Entry point of the console script."""
    app.main()
