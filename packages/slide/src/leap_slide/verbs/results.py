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
    """Train tiny transformers on digits with local attention and its rivals, and measure memory and time over k.

    Writes section.html and its figures. Takes about ten minutes. Killed, it goes on from where it was when started
    again.

    Examples:
        leap-slide demo --out runs/demo
        leap-slide demo --quick
    """

    seeds: int = 10
    """How many seeds, each with its own split, weights and batches; the first is --seed."""
    quick: bool = False
    """A smoke test of ten seconds with two seeds: shows that everything runs, says nothing about the claim."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        import torch

        from leap_slide import demo

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
        leap-slide experiment --seeds 20 --out runs/experiment
        leap-slide experiment --arms windows slide --kernel-size 5 --no-costs
    """

    arms: tuple[Literal["conv", "windows", "fixed", "slide"], ...] = ("conv", "windows", "fixed", "slide")
    """What is trained; windows and slide, which the claim compares, must be among them."""
    seeds: int = 10
    kernel_size: int = 3
    """k of the convolution, of the fixed shifts and of slide attention, odd."""
    window: int = 4
    """Side of the windows, a divisor of 8."""
    costs: bool = True
    """Whether to measure memory and time for k = 3, 5, 7."""

    def run(self, context: Context) -> object:
        """Run the experiment."""
        from leap_slide import demo
        from leap_slide.digits import Recipe

        seeds, numbers = self.numbers()
        recipe = Recipe(**numbers, kernel_size=self.kernel_size, window=self.window)
        kernel_sizes = demo.KERNEL_SIZES if self.costs else ()
        settings = demo.Settings(seeds=seeds, arms=self.arms, recipe=recipe, kernel_sizes=kernel_sizes)
        result = demo.run(settings, context)
        return result if self.json else demo.table(result)
