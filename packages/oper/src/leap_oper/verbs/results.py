"""Verbs that show: reports, benchmarks, the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Bench", "Demo", "Report"]


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Join trainings into one page: scores with intervals, improvement over uniform sampling, curves, priorities.

    Examples:
        leap-oper report runs/sweep --out runs/report
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """What `train` or `sweep` wrote; folders in them are found."""

    def run(self, context: Context) -> object:
        """Write report.json, report.md and index.html."""
        from leap_oper.pages import write_report

        return write_report(self.folders, context.out)


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Clone behaviour from PointMaze data with and without priorities; writes section.html and its figures.

    Takes about two minutes on two cores. Killed, it goes on from where it was when started again.

    Examples:
        leap-oper demo --seeds 5 --out runs/demo
        leap-oper demo --full --out runs/demo
    """

    seeds: int = 5
    """How many seeds; each makes its own data set and its own policies. The first is --seed."""
    quick: bool = False
    """A smoke test of ten seconds with two seeds: shows that everything runs, says nothing about the claim."""
    full: bool = False
    """Also record a medium-replay set of InvertedDoublePendulum and train TD3+BC and IQL on it (about half an hour)."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        from leap_oper import demo

        if self.quick and (self.full or self.seeds != type(self).seeds):
            raise UserError("--quick has two seeds and no further parts: leave out --seeds and --full")
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        settings = demo.Settings.quick(self.seed) if self.quick else demo.Settings(seeds=seeds, full=self.full)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure samplers, trainers and readers beside their peers; one thread, interleaved.

    Examples:
        leap-oper bench --json
        leap-oper bench --only samplers trainers
    """

    only: tuple[str, ...] = ()
    """Parts to measure; all where none is given."""
    quick: bool = False
    """Few rounds on small data: shows that everything runs."""
    threads: int = 1
    """Threads of PyTorch."""

    def run(self, context: Context) -> object:
        """Measure."""
        from leap_oper import benchmark

        return benchmark.run(self.only, self.threads, context, quick=self.quick)
