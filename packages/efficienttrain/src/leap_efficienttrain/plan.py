"""A curriculum on a data set: what each pass and each update of the training is like."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from leap_efficienttrain.released import randaug_policy
from leap_efficienttrain.schedule import continuous_rate, reference_rate, resume_epoch, stage_boundary, stage_epochs
from leap_efficienttrain.stages import CurriculumFields, LearningRate, Stage
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["Leg", "Plan", "State", "make_plan"]


@dataclass(frozen=True)
class Leg:
    """A stage as it is trained.

    Attributes:
        stage, index: of the curriculum.
        passes: over the decoded data; a whole number in reference arithmetic.
        start_epoch: passes that the stage counts as done when it begins, in its own unit.
        total_epochs: passes that the whole training would have in this unit.
        micro_batch: decoded pictures per process and forward pass.
        accumulate: forward passes per update.
        world: processes.
        steps_per_epoch, updates: updates of a pass, and of the stage; None where the size of the data is unknown.
        first_update: updates before the stage.
        progress, progress_end: share of the training that is over when it begins and ends.
        warmup_steps: of the reference rule.
    """

    stage: Stage
    index: int
    passes: Number
    start_epoch: int
    total_epochs: Number
    micro_batch: int
    accumulate: int
    world: int
    steps_per_epoch: int | None
    updates: int | None
    first_update: int
    progress: float
    progress_end: float
    warmup_steps: int

    @property
    def batch(self) -> int:
        """Training pictures of an update over all processes, replayed ones too."""
        return self.micro_batch * self.stage.replay * self.accumulate * self.world


@dataclass(frozen=True)
class State:
    """What holds for one pass over the data, or for the part of one in which a stage ends.

    Attributes:
        leg: the stage as it is trained.
        epoch: number of this pass in the whole training.
        first_step: updates of the stage before it; in passes where the size of the data is unknown.
        fraction: share of the data that it goes through.
        settings: the curriculum's learning rate.
        equivalent_epochs: of the curriculum.
    """

    leg: Leg
    epoch: int
    first_step: Number
    fraction: float
    settings: LearningRate
    equivalent_epochs: Number

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return self.leg.stage.size

    @property
    def magnitude(self) -> Number:
        """Magnitude of RandAugment."""
        return self.leg.stage.randaug

    @property
    def randaug(self) -> str:
        """RandAugment in timm's terms, as rand-m9-mstd0.5-inc1."""
        return randaug_policy(self.magnitude)

    @property
    def stage(self) -> int:
        """Number of the stage."""
        return self.leg.index

    @property
    def micro_batch(self) -> int:
        """Decoded pictures per process and forward pass."""
        return self.leg.micro_batch

    @property
    def accumulate(self) -> int:
        """Forward passes per update."""
        return self.leg.accumulate

    @property
    def replay(self) -> int:
        """Training pictures for each decoded one."""
        return self.leg.stage.replay

    @property
    def buffer(self) -> int:
        """Batches that the replay buffer holds."""
        return self.leg.stage.buffer

    @property
    def steps(self) -> int | None:
        """Updates of this pass; None where the size of the data is unknown."""
        if self.leg.steps_per_epoch is None:
            return None
        return round(self.fraction * self.leg.steps_per_epoch)

    @property
    def first_update(self) -> int | None:
        """Updates of the whole training before this pass; None where the size of the data is unknown."""
        return None if self.leg.steps_per_epoch is None else self.leg.first_update + int(self.first_step)

    @property
    def progress(self) -> float:
        """Share of the training that is over when this pass begins."""
        return self.progress_at(0)

    def progress_at(self, step: Number = 0, steps: int | None = None) -> float:
        """Share of the training that is over before update `step` of this pass."""
        if self.leg.updates is None and not step:
            inside = self.first_step / self.leg.passes
        else:
            per_epoch = self._steps(steps)
            before = self.first_step if self.leg.updates is not None else self.first_step * per_epoch
            inside = (before + step) / (self.leg.updates or self.leg.passes * per_epoch)
        return self.leg.progress + (self.leg.progress_end - self.leg.progress) * inside

    def lr(self, step: Number = 0, steps: int | None = None) -> float:
        """Learning rate of update `step` of this pass.

        Args:
            step: from 0.
            steps: updates of a whole pass, where the curriculum was not told how many `samples` there are.

        Raises:
            UserError: neither is known.
        """
        lr, leg = self.settings, self.leg
        base = lr.of_batch(leg.stage.batch_scale)
        if lr.rule == "reference":
            per_epoch = self._steps(steps)
            before = self.first_step if leg.updates is not None else self.first_step * per_epoch
            at = np.array([leg.start_epoch * per_epoch + before + step], dtype=np.float64)
            total, warmup = round(leg.total_epochs * per_epoch), leg.warmup_steps * per_epoch
            return float(reference_rate(at, base, lr.final, total, warmup)[0])
        share = min(lr.warmup_epochs / self.equivalent_epochs, 0.2) if lr.warmup_share is None else lr.warmup_share
        return continuous_rate(self.progress_at(step, steps), share, base, lr.final, lr.kind)

    def _steps(self, steps: int | None) -> int:
        known = steps or self.leg.steps_per_epoch
        if known is None:
            raise UserError("how many updates a pass has is unknown: give samples to epochs(), or steps to lr()")
        return known


@dataclass(frozen=True)
class Plan:
    """A curriculum on a data set."""

    curriculum: CurriculumFields
    legs: tuple[Leg, ...]
    samples: int | None
    world: int

    @cached_property
    def states(self) -> list[State]:
        """The state of each pass, or of the part of one in which a stage ends."""
        states: list[State] = []
        lr, epochs = self.curriculum.lr, self.curriculum.equivalent_epochs
        for leg in self.legs:
            unit: Number = leg.steps_per_epoch or 1
            length: Number = leg.passes if leg.updates is None else leg.updates
            for number in range(math.ceil(length / unit)):
                fraction = min(1.0, (length - number * unit) / unit)
                states.append(State(leg, len(states), number * unit, fraction, lr, epochs))
        return states

    @property
    def passes(self) -> Number:
        """Passes over the data, decoded pictures counted once."""
        return sum(leg.passes for leg in self.legs)

    @property
    def updates(self) -> int:
        """Updates of the whole training.

        Raises:
            UserError: the size of the data is unknown.
        """
        if self.samples is None:
            raise UserError("how many updates there are is unknown: give samples to plan()")
        return sum(leg.updates or 0 for leg in self.legs)

    def at(self, update: int) -> State:
        """The state of one update, from 0; after the last one, the last state.

        Raises:
            UserError: the size of the data is unknown, or `update` is negative.
        """
        if update < 0 or self.samples is None:
            raise UserError(f"update {update}, samples {self.samples}: expected 0 or more, and the size of the data")
        return self.states[max(bisect_right(self._starts, update) - 1, 0)]

    def lr(self, update: int) -> float:
        """Learning rate of one update of the whole training, from 0."""
        state = self.at(update)
        return state.lr(update - (state.first_update or 0))

    @cached_property
    def _starts(self) -> list[int]:
        return [state.first_update or 0 for state in self.states]


def make_plan(curriculum: CurriculumFields, samples: int | None, world: int) -> Plan:
    """See `Curriculum.plan`."""
    if world < 1 or (samples is not None and samples < 1):
        raise UserError(f"samples {samples}, world {world}: expected 1 or more of each")
    legs: list[Leg] = []
    empty: list[str] = []
    share = 0.0
    for index, stage in enumerate(curriculum.stages):
        micro, accumulate = _micro_batch(curriculum, stage, world)
        start, total, passes = _epochs(curriculum, index, legs)
        per_epoch = None if samples is None else samples // (micro * accumulate * world)
        if per_epoch == 0 and (curriculum.arithmetic == "continuous" or passes):
            batch = f"{micro} x {accumulate} x {world}"
            short = f", and of {curriculum.equivalent_epochs:g} epochs nothing is left for stage {', '.join(empty)}"
            given = f"stage {index + 1}: a batch of {batch} is more than the {samples} pictures"
            raise UserError(f"{given}{short if empty else ''}: lower batch")
        updates = None if per_epoch is None else round(passes * per_epoch)
        if not passes or updates == 0:
            empty.append(f"{index + 1} ({stage.size} pixels)")
        legs.append(
            Leg(
                stage=stage,
                index=index,
                passes=passes,
                start_epoch=start,
                total_epochs=total,
                micro_batch=micro,
                accumulate=accumulate,
                world=world,
                steps_per_epoch=per_epoch,
                updates=updates,
                first_update=sum(leg.updates or 0 for leg in legs),
                progress=share,
                progress_end=min(share + stage.share, 1.0) if index + 1 < len(curriculum.stages) else 1.0,
                warmup_steps=_warmup(curriculum, stage),
            )
        )
        share += stage.share
    if empty:
        few = f"of {curriculum.equivalent_epochs:g} equivalent epochs nothing is left for stage {', '.join(empty)}"
        raise UserError(f"{few}: raise the epochs, take fewer stages, or arithmetic='continuous'")
    return Plan(curriculum, tuple(legs), samples, world)


def _micro_batch(curriculum: CurriculumFields, stage: Stage, world: int) -> tuple[int, int]:
    """Decoded pictures per forward pass, and forward passes per update."""
    total = curriculum.batch * stage.batch_scale
    if total % world or not (total / world).is_integer():
        raise UserError(f"a batch of {total:g} does not divide by {world} processes: take a multiple")
    share = int(total // world)
    micro = min(share, int((curriculum.micro_batch or share) * stage.micro_batch_scale))
    if not micro or share % micro:
        parts = f"micro-batches of {micro} on {world} processes do not make up a batch of {total:g}"
        near = max(size for size in range(1, max(micro, 1) + 1) if share % size == 0)
        raise UserError(f"{stage.size} pixels: {parts}: take micro-batches of {near}, or another batch")
    if stage.replay > 1:
        if share != micro:
            given = f"replay {stage.replay} with {share // micro} forward passes per update"
            raise UserError(f"{stage.size} pixels: {given}: replay takes one, so raise micro_batch or lower batch")
        if micro < stage.replay:
            raise UserError(f"{stage.size} pixels: a batch of {micro} with replay {stage.replay} has no fresh pictures")
        micro = micro // stage.replay
    return micro, 1 if stage.replay > 1 else share // micro


def _epochs(curriculum: CurriculumFields, index: int, legs: list[Leg]) -> tuple[int, Number, Number]:
    """Passes that a stage counts as done at its start, those of the whole training in its unit, and its own."""
    stage, base, length = curriculum.stages[index], curriculum.base_size, curriculum.equivalent_epochs
    compute, shares = curriculum.unit == "compute", [stage.share for stage in curriculum.stages]
    if curriculum.arithmetic == "continuous":
        total = length * (base * base / (stage.size * stage.size) if compute else 1) / stage.replay
        return 0, total, stage.share * total
    before = legs[-1] if legs else None
    done = before.start_epoch + int(before.passes) if before else 0
    if not compute:
        end = stage_boundary(length, shares, index)
        return done, int(length), end - done
    total = stage_epochs(length, base, stage.size, stage.replay)
    if before:
        done = resume_epoch(done, before.stage.size, stage.size, before.stage.replay, stage.replay)
    return done, total, max(stage_boundary(total, shares, index) - done, 0)


def _warmup(curriculum: CurriculumFields, stage: Stage) -> int:
    """Warm-up of the reference rule, in passes."""
    lr = curriculum.lr
    if lr.warmup_share is None:
        return int(lr.warmup_epochs / stage.replay)
    ratio = curriculum.base_size * curriculum.base_size / (stage.size * stage.size)
    return int(lr.warmup_share * curriculum.equivalent_epochs * ratio / stage.replay)
