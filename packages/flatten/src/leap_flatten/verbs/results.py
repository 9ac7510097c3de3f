"""Verbs that show what the paper claims, in small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leap_shared.cli import Command, Context
from leap_shared.errors import UserError
from leap_shared.vision.digits import DigitsExperiment

__all__ = ["Demo", "Experiment"]


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train tiny transformers on digits with softmax and linear attention; writes section.html and its figures.

    Takes about eight minutes. Killed, it goes on from where it was when started again.

    Examples:
        leap-flatten demo --out runs/demo
        leap-flatten demo --quick
    """

    seeds: int = 8
    """How many seeds, each with its own split, weights and batches; the first is --seed."""
    quick: bool = False
    """A smoke test of ten seconds with two seeds: shows that everything runs, says nothing about the claim."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        import torch

        from leap_flatten import demo

        if self.quick and self.seeds != type(self).seeds:
            raise UserError("--quick has two seeds: leave out --seeds")
        torch.set_num_threads(1)
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        settings = demo.Settings.quick(self.seed) if self.quick else demo.Settings(seeds=seeds)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)


@dataclass(frozen=True, kw_only=True)
class Experiment(DigitsExperiment):
    """The demo's experiment with other sizes, arms and training; killed, it goes on, and more seeds join it.

    Examples:
        leap-flatten experiment --seeds 16 --out runs/experiment
        leap-flatten experiment --arms linear focus-dwc dwc --p 4 --kernel-size 3
    """

    arms: tuple[Literal["softmax", "linear", "focus", "focus-dwc", "dwc"], ...] = (
        "softmax",
        "linear",
        "focus",
        "focus-dwc",
    )
    """What is trained; linear and focus-dwc, which the claim compares, must be among them."""
    seeds: int = 8
    p: float = 3.0
    """Focusing factor of the arms with focus."""
    kernel_size: int = 5
    """Side of the depthwise convolution."""
    latency: bool = True
    """Whether to time the layers over the number of tokens."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        from leap_flatten import demo
        from leap_flatten.digits import Recipe

        seeds, numbers = self.numbers()
        recipe = Recipe(**numbers, focusing_factor=self.p, kernel_size=self.kernel_size)
        sides = demo.SIDES if self.latency else ()
        settings = demo.Settings(seeds=seeds, arms=self.arms, recipe=recipe, sides=sides)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)
