"""The magnitude of a RandAugment that is built already, timm's or torchvision's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from timm.data.auto_augment import RandAugment, posterize
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.data import posterize_at_zero

__all__ = ["Magnitude", "walk"]


class Magnitude:
    """Drives RandAugments by one magnitude on timm's scale of 0 to 10, whole or not.

    torchvision's magnitudes are numbers of bins, of which M / 10 is taken: at 31 bins, M = 9 is its 27, which rotates
    and shears as much as timm's, and its default of 9 is M = 3.

    Args:
        transforms: timm's or torchvision's.
        off_at_zero: leave them out at magnitude 0.
    """

    def __init__(self, transforms: list[Any], off_at_zero: bool = False) -> None:
        self.off_at_zero = off_at_zero
        self._driven = [(transform, _operations(transform)) for transform in transforms]
        first = transforms[0]
        self._value: Number = (
            first.ops[0].magnitude
            if isinstance(first, RandAugment)
            else first.magnitude / (first.num_magnitude_bins - 1) * 10
        )

    @classmethod
    def found(cls, steps: Iterable[Any], off_at_zero: bool = False) -> Magnitude | None:
        """The magnitude of the RandAugments among the steps and what they hold; None where there is none."""
        found = [step for step in walk(steps) if isinstance(step, (RandAugment, v1.RandAugment, v2.RandAugment))]
        for operation in (operation for step in found for operation in getattr(step, "ops", ())):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_at_zero
        return cls(found, off_at_zero) if found else None

    @property
    def value(self) -> Number:
        """The magnitude."""
        return self._value

    @value.setter
    def value(self, magnitude: Number) -> None:
        if magnitude == self._value:
            return
        self._value = magnitude
        off = self.off_at_zero and magnitude == 0
        for transform, operations in self._driven:
            if isinstance(transform, RandAugment):
                for operation in transform.ops:
                    operation.magnitude = magnitude
                transform.num_layers = 0 if off else operations
            else:
                transform.magnitude = round(magnitude / 10 * (transform.num_magnitude_bins - 1))
                transform.num_ops = 0 if off else operations


def _operations(transform: Any) -> int:
    """How many operations act on a picture."""
    operations: int = transform.num_layers if isinstance(transform, RandAugment) else transform.num_ops
    return operations


def walk(steps: Iterable[Any]) -> Iterator[Any]:
    """The steps, and what they hold as `transforms` or as modules in sequence."""
    for step in steps:
        yield step
        inner = step if isinstance(step, nn.Sequential) else getattr(step, "transforms", ())
        if isinstance(inner, Iterable):
            yield from walk(inner)
