"""What the demonstration trains, on which pictures, and what it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from leap_efficienttrain import tasks
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.miniature import Recipe
from leap_efficienttrain.stages import LearningRate
from leap_shared.errors import UserError
from leap_shared.experiment import Estimate, Experiment, mean
from leap_shared.vision.bodies.grids import Number

__all__ = ["ARMS", "COMPARISONS", "MATCHED", "METRIC", "SECONDS", "Arm", "Comparison", "Problem", "interval"]

METRIC, SECONDS = "test accuracy", "seconds"
FULL_MAGNITUDE = 9


class Arm(NamedTuple):
    """One way to train."""

    title: str
    share: float
    """Of the compute of the whole ordinary training, T epochs at full size."""
    sizes: bool = False
    """Whether sizes are those of EfficientTrain++."""
    magnitudes: bool = False
    """Whether magnitudes of augmentation are."""


ARMS = {
    "full": Arm("ordinary, T", 1),
    "two thirds": Arm("ordinary, 2T/3", 2 / 3),
    "third": Arm("ordinary, T/3", 1 / 3),
    "et two thirds": Arm("ET++, 2T/3", 2 / 3, sizes=True, magnitudes=True),
    "et third": Arm("ET++, T/3", 1 / 3, sizes=True, magnitudes=True),
    "sizes third": Arm("sizes only, T/3", 1 / 3, sizes=True),
    "magnitudes third": Arm("magnitudes only, T/3", 1 / 3, magnitudes=True),
    "matched": Arm("ordinary, seconds of ET++ 2T/3", 1),
}
MATCHED = "matched"  # its epochs follow from the seconds that `full` and `et two thirds` took


@dataclass(frozen=True)
class Problem:
    """Pictures, and for how long and at which sizes is trained on them.

    Raises:
        UserError: a number is impossible, or the user's own pictures are named in part.
    """

    kind: Literal["photographs", "digits", "given"] = "photographs"
    side: int = 96
    """Full size in pixels."""
    multiple: int = 16
    """The stages' sizes, in proportion to those for 224 pixels, are multiples of it: of 16 for the default network's
    operations to shrink as its pixels do."""
    epochs: Number = 4
    """T."""
    per_photograph: tuple[int, int] = (68, 40)
    """Patches to train on and to test."""
    data: str = ""
    """The user's own pictures, see `tasks.given`."""
    validation: str = ""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"epochs is {self.epochs}: expected a positive number")
        if (self.kind == "given") != bool(self.data) or bool(self.data) != bool(self.validation):
            raise UserError(f"data {self.data!r}, validation {self.validation!r}: give both, or none")
        self.curriculum("et third", Recipe())

    @property
    def title(self) -> str:
        """What is classified."""
        name = {"photographs": "photographs", "digits": "digits", "given": self.data}[self.kind]
        return f"{name}, {self.side} px"

    def load(self, seed: int) -> tasks.Task:
        """The pictures; `seed` draws which of them are to train on, but for the user's own."""
        if self.kind == "photographs":
            return tasks.photographs(seed, self.side, *self.per_photograph)
        return (
            tasks.digits(seed, self.side)
            if self.kind == "digits"
            else tasks.given(self.data, self.validation, self.side)
        )

    def curriculum(self, arm: str, recipe: Recipe, epochs: Number | None = None) -> Curriculum:
        """What an arm trains.

        Args:
            arm: key of `ARMS`.
            recipe: its batch and rate.
            epochs: equivalent epochs; the arm's share of T where none are given.
        """
        chosen = ARMS[arm]
        length = chosen.share * self.epochs if epochs is None else epochs
        whole = Curriculum.preset("et++", length).scaled(self.side, self.multiple)
        if not (chosen.sizes or chosen.magnitudes):
            whole = Curriculum.constant(length, self.side, FULL_MAGNITUDE)
        stages = tuple(
            replace(
                stage,
                size=stage.size if chosen.sizes else self.side,
                randaug=stage.randaug if chosen.magnitudes else FULL_MAGNITUDE,
            )
            for stage in whole.stages
        )
        lr = LearningRate(base=recipe.learning_rate, warmup_share=recipe.warmup_share)
        return replace(whole, stages=stages, arithmetic="continuous", batch=recipe.batch, lr=lr)


class Comparison(NamedTuple):
    """Two arms, and the rule that judges the differences between them, seed by seed."""

    method: str
    baseline: str
    rule: Literal["more accurate", "as accurate", "faster"]
    """more accurate, faster: as an `Experiment` does. as accurate: not worse by more than the least difference that
    matters, reproduced where the whole interval is above minus that, not reproduced where all of it is below."""
    claim: str = ""
    """What is claimed; nothing is where the comparison only explains."""

    @property
    def name(self) -> str:
        """What is subtracted."""
        return f"{ARMS[self.method].title} - {ARMS[self.baseline].title}"

    def judge(
        self, experiment: Experiment, outcomes: Mapping[str, Mapping[int, Mapping[str, float]]], least_saving: Number
    ) -> dict[str, Any]:
        """Differences with interval and verdict: of accuracies in points, or what is saved of the seconds in percent.

        Args:
            experiment: whose rule and least difference hold.
            outcomes: by title of the arm and seed.
            least_saving: of seconds, in percent, that would matter.
        """
        ours, theirs = (outcomes[ARMS[arm].title] for arm in (self.method, self.baseline))
        if self.rule == "faster":
            values = [100 * (1 - ours[seed][SECONDS] / theirs[seed][SECONDS]) for seed in sorted(ours)]
        else:
            values = [ours[seed][METRIC] - theirs[seed][METRIC] for seed in sorted(ours)]
        estimate = mean(values)
        facts = {"comparison": self.name, "rule": self.rule, "claim": self.claim, "values": values, **interval(values)}
        return {**facts, "verdict": self._verdict(experiment, estimate, least_saving)}

    def _verdict(self, experiment: Experiment, estimate: Estimate, least_saving: Number) -> str:
        if self.rule == "more accurate":
            return experiment.verdict(estimate)
        if self.rule == "faster":
            return replace(experiment, smallest_effect=float(least_saving)).verdict(estimate)
        if estimate.low > -experiment.smallest_effect:
            return "reproduced"
        return "not reproduced" if estimate.high < -experiment.smallest_effect else "underpowered"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and its 95% interval, null where one value shows no spread."""
    estimate = mean(values)
    return {
        "estimate": estimate.value,
        "interval": [estimate.low, estimate.high] if np.isfinite(estimate.low) else None,
    }


COMPARISONS = (
    Comparison("et third", "third", "more accurate", "with a third of the compute it is more accurate"),
    Comparison("et two thirds", "full", "as accurate", "two thirds of the compute make it as accurate as all of it"),
    Comparison("et two thirds", "full", "faster", "what is saved in compute is saved in seconds"),
    Comparison("et two thirds", MATCHED, "more accurate", "in the same seconds it is more accurate"),
    Comparison("et two thirds", "two thirds", "more accurate"),
    Comparison("sizes third", "third", "more accurate"),
    Comparison("magnitudes third", "third", "more accurate"),
    Comparison("et third", "magnitudes third", "more accurate"),
)
