"""Verbs that measure, and that show what the paper claims, in small."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import tyro

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError

__all__ = ["Bench", "Demo"]


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure crops, down-sampling, loaders and training steps beside their peers, interleaved.

    Parts are crop (with its gradient), lanczos, loader and step; each writes a table, a picture and the machine's
    stamp. On a CPU one thread is timed by its own clock.

    Examples:
        leap-efficienttrain bench crop loader --threads 1
        leap-efficienttrain bench --quick
    """

    parts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Parts to measure; all where none is given."""
    threads: tuple[int, ...] = (1,)
    """Numbers of CPU threads, one after the other; 0 is what PyTorch takes by itself."""
    rounds: int = 15
    """How often each contender's turn comes."""
    quick: bool = False
    """A trial of less than a minute on small sizes: shows that everything runs."""

    def run(self, context: Context) -> object:
        """Measure."""
        from leap_efficienttrain import benchmark

        make = benchmark.Settings.quick if self.quick else partial(benchmark.Settings, rounds=self.rounds)
        options: dict[str, Any] = {"parts": self.parts, "threads": self.threads}
        return benchmark.run(make(**options), context)


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train on real pictures with and without the curriculum, at equal compute and at equal seconds.

    Writes section.html and its figure. Killed, it goes on from where it was when started again.

    Examples:
        leap-efficienttrain demo --out runs/demo
        leap-efficienttrain demo --quick
    """

    seeds: int = 6
    """How many seeds, each with its own split, weights and batches; the first is --seed."""
    quick: bool = False
    """A smoke test with two seeds: shows that everything runs, says nothing about the claim."""
    data: str | None = None
    """Training pictures of your own in place of the bundled ones: a folder of class folders, shards or an .npz file."""
    validation: str | None = None
    """Pictures to test on, with --data."""
    side: int = 96
    """Full size in pixels, with --data."""
    epochs: float = 4.0
    """Epochs of the ordinary training, with --data."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        import torch

        from leap_efficienttrain import demo

        if self.quick and self.seeds != type(self).seeds:
            raise UserError("--quick has two seeds: leave out --seeds")
        torch.set_num_threads(1)
        if (self.data is None) != (self.validation is None) or (self.quick and self.data is not None):
            raise UserError("--data and --validation go together, and without --quick")
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        settings = demo.Settings.quick(self.seed) if self.quick else demo.Settings(seeds=seeds)
        if self.data is not None and self.validation is not None:
            settings = demo.Settings.of(self.data, self.validation, self.side, self.epochs, seeds=seeds)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)
