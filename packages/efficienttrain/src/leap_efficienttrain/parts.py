"""Parts of a training as curricula of their own, for trainings that go on from each other's checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.schedule import continuous_rate
from leap_efficienttrain.stages import LearningRate, any_last_size
from leap_shared.vision.bodies.grids import Number

__all__ = ["fine_tune_after", "part"]

_SMALLEST = 1e-9  # of the peak: a rate must be above zero, and a curve may end there


def part(curriculum: Curriculum, index: int) -> Curriculum:
    """Stage `index` of a curriculum alone: its compute, and its part of the continuous learning-rate curve.

    The curve becomes a straight line between the rates at which the stage begins and ends; a warm-up stays one.
    """
    share = curriculum.stages[index].share
    begin = math.fsum(stage.share for stage in curriculum.stages[:index])
    with any_last_size():
        return _alone(curriculum, index, share, _line(curriculum, begin, begin + share))


def fine_tune_after(curriculum: Curriculum, index: int, share: Number) -> Curriculum:
    """A short training as in the last stage after stage `index`, of a share of the whole.

    The learning rate falls in a line from where that stage ends to where the whole training ends.
    """
    begin = math.fsum(stage.share for stage in curriculum.stages[: index + 1])
    lr = curriculum.lr
    rate = max(_rate(curriculum, begin), _SMALLEST * lr.base)
    falling = LearningRate(kind="linear", base=rate, final=min(lr.final, rate), warmup_epochs=0, scaling=lr.scaling)
    return _alone(curriculum, -1, share, falling)


def _alone(curriculum: Curriculum, index: int, share: Number, lr: LearningRate) -> Curriculum:
    reference = curriculum.drop_path_reference  # in proportion, so that the rate of the whole stays
    return replace(
        curriculum,
        stages=(replace(curriculum.stages[index], share=1),),
        equivalent_epochs=curriculum.equivalent_epochs * share,
        drop_path_reference=None if reference is None else reference * share,
        lr=lr,
    )


def _warmup(curriculum: Curriculum) -> float:
    lr = curriculum.lr
    share = min(lr.warmup_epochs / curriculum.equivalent_epochs, 0.2) if lr.warmup_share is None else lr.warmup_share
    return float(share)


def _rate(curriculum: Curriculum, progress: Number) -> float:
    lr = curriculum.lr
    return continuous_rate(progress, _warmup(curriculum), lr.base, lr.final, lr.kind)


def _line(curriculum: Curriculum, begin: float, end: float) -> LearningRate:
    warmup, scaling = _warmup(curriculum), curriculum.lr.scaling
    last = _rate(curriculum, end)
    if begin == 0 and warmup > 0:
        rising = min(warmup / end, math.nextafter(1, 0))
        top = _rate(curriculum, min(warmup, end))
        return LearningRate(kind="linear", base=top, final=last, warmup_share=rising, scaling=scaling)
    first = _rate(curriculum, begin)
    return LearningRate(kind="linear", base=first, final=last, warmup_epochs=0, scaling=scaling)
