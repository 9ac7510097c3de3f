"""Search of a curriculum for a new task.

Greedy as in EfficientTrain (Wang et al., ICCV 2023), or sequential under a constraint of compute as in
EfficientTrain++ (TPAMI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.executors import make_executor
from leap_efficienttrain.parts import fine_tune_after, part
from leap_efficienttrain.stages import Stage, any_last_size
from leap_efficienttrain.trials import Outcome, TrainFunction, Trial, TrialLog, Trials, takes_seed
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number

__all__ = ["Search", "SearchResult", "search"]

METHODS = ("greedy", "sequential")
OWN = {"stages", "equivalent_epochs", "base_size", "unit"}  # fields of a curriculum that the search sets itself


@dataclass(frozen=True)
class SearchResult:
    """A found curriculum and the trials that led to it. Printed, it is a line for each of them.

    Attributes:
        curriculum: the one that was found.
        target: accuracy of the ordinary training that a greedy search had to reach; None in a sequential one.
        outcomes: of all trials that the search asked for, in order, those read from its log too.
    """

    curriculum: Curriculum
    target: float | None
    outcomes: tuple[Outcome, ...]

    @property
    def cost(self) -> float:
        """Of all trials, in epochs at the base size."""
        return math.fsum(outcome.trial.cost for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """Of all trials together, as if one had run after the other."""
        return math.fsum(outcome.seconds for outcome in self.outcomes)

    def __str__(self) -> str:
        """The table."""
        lines = [f"{outcome.accuracy:.4g}  {outcome.trial}  ({outcome.seconds:.1f} s)" for outcome in self.outcomes]
        sizes = ", ".join(str(stage.size) for stage in self.curriculum.stages)
        cost = f"{self.cost:.4g} epochs at {self.curriculum.base_size} pixels and {self.seconds:.0f} s"
        return "\n".join([*lines, f"sizes {sizes}, found in {len(self.outcomes)} trials of {cost}"])


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, see `search`; `run` does it.

    Raises:
        UserError: a value is impossible.
    """

    budget: Number
    """Of the training: epochs (greedy), or compute in epochs at the base size (sequential)."""
    sizes: Sequence[int] = (96, 128, 160, 192, 224)
    """Candidates, ascending."""
    stages: int = 5
    """Of equal epochs (greedy), or of equal compute (sequential)."""
    method: str = "greedy"
    base_size: int | None = None
    """Full size, at which is tested; None: the largest candidate."""
    magnitudes: Sequence[Number] | None = None
    """Of RandAugment in each stage; None: a line from 1 to 9."""
    tolerance: Number = 0
    """Accuracy by which a size may fall short of the target (greedy), or of the best size (sequential)."""
    target: Number | None = None
    """greedy: accuracy to reach; None: that of ordinary training at the base size, which is then a trial."""
    repeats: int = 1
    """Seeds for each trial, from `seed` on; the mean of their accuracies counts."""
    seed: int = 0
    fine_tune: Number = 0.05
    """sequential: share of the budget for the training at the base size that comes before a candidate is judged."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the curricula, such as batch and lr; their arithmetic is continuous where none is given."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown: {did_you_mean(self.method, METHODS)}")
        sizes, full = list(self.sizes), self.full_size
        given = f"sizes {', '.join(map(str, sizes))}"
        if not sizes or not all(type(size) is int and size > 0 for size in (*sizes, full)):
            raise UserError(f"{given}, base size {full}: expected whole numbers of pixels above 0, one or more")
        for name, holds, expected in (
            (given, sizes == sorted(set(sizes)), "ascending order, each once"),
            (given, sizes[-1] <= full, f"none above the base size {full}"),
            (given, sizes[0] < full, f"one or more below the base size {full}"),
            (f"budget {self.budget}", 0 < self.budget < math.inf, "epochs at the base size, above 0"),
            (f"stages {self.stages}", self.stages >= 1, "1 or more"),
            (f"repeats {self.repeats}", self.repeats >= 1, "1 or more"),
            (f"tolerance {self.tolerance}", 0 <= self.tolerance < math.inf, "an accuracy, 0 or more"),
            (f"target {self.target}", self.target is None or math.isfinite(self.target), "an accuracy, or None"),
            (f"fine_tune {self.fine_tune}", 0 < self.fine_tune <= 1, "a share of the budget, above 0, at most 1"),
        ):
            if not holds:
                raise UserError(f"{name}: expected {expected}")
        if self.magnitudes is not None and len(self.magnitudes) != self.stages:
            raise UserError(f"{len(self.magnitudes)} magnitudes for {self.stages} stages: give one for each stage")
        known = {entry.name for entry in fields(Curriculum)} - OWN
        if unknown := sorted(self.changes.keys() - known):
            raise UserError(f"the search sets no field {unknown[0]!r}: {did_you_mean(unknown[0], known)}")
        self.curriculum()

    @property
    def full_size(self) -> int:
        """Size of the test, and of the last stage where that is not searched."""
        return (self.sizes[-1] if self.sizes else 0) if self.base_size is None else self.base_size

    @property
    def ramp(self) -> list[Number]:
        """Magnitude of each stage."""
        if self.magnitudes is not None:
            return list(self.magnitudes)
        return [9 - 8 * index / max(self.stages - 1, 1) for index in reversed(range(self.stages))]

    def curriculum(self, *sizes: int) -> Curriculum:
        """The training whose first stages have these sizes, and the others the base size."""
        each = [*sizes, *[self.full_size] * (self.stages - len(sizes))]
        stages = [Stage(1 / self.stages, size, ramp) for size, ramp in zip(each, self.ramp, strict=True)]
        return self._curriculum(stages)

    def _curriculum(self, stages: Sequence[Stage]) -> Curriculum:
        given = {"unit": "epochs" if self.method == "greedy" else "compute", "arithmetic": "continuous", **self.changes}
        return Curriculum(tuple(stages), self.budget, self.full_size, **given)

    def run(
        self,
        train_fn: TrainFunction,
        *,
        workers: int = 1,
        runner: str | Executor | None = None,
        log: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        reporter: Any = None,
    ) -> SearchResult:
        """See `search`, which returns the curriculum of this result."""
        seeds = takes_seed(train_fn)
        if self.repeats > 1 and not seeds:
            raise UserError(f"{self.repeats} repeats of a train function without a parameter seed would be the same")
        trial_log = TrialLog(log, self._head(settings or {}))
        executor = make_executor(runner, workers, train_fn)
        with closing(Trials(train_fn, executor, workers, trial_log, reporter, executor is not runner)) as trials:
            target = None
            if self.method == "sequential":
                sizes = self._sequential(trials)
            elif self.stages > 1:
                target = float(self._baseline(trials) if self.target is None else self.target)
                sizes = self._greedy(trials, target - self.tolerance)
            else:
                sizes = []
        return SearchResult(self.curriculum(*sizes), target, tuple(trials.used))

    def _head(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What trials of this search depend on. Those made with another tolerance, target or seeds still hold."""
        own: dict[str, Any] = {"method": self.method, "sizes": self.sizes, "stages": self.stages, "budget": self.budget}
        own |= {"base_size": self.full_size, "magnitudes": self.ramp}
        own |= {"fine_tune": self.fine_tune} if self.method == "sequential" else {}
        document = yaml.safe_load(self.curriculum().to_yaml())
        others = {name: value for name, value in document.items() if name not in {*own, "epochs"}}
        return {**own, "curriculum": others, "settings": dict(settings)}

    def _seeded(self, purpose: str, curriculum: Curriculum) -> list[Trial]:
        return [Trial(purpose, curriculum, self.seed + repeat) for repeat in range(self.repeats)]

    def _baseline(self, trials: Trials) -> float:
        plain = self._curriculum([Stage(1, self.full_size, self.ramp[-1])])
        return fmean(outcome.accuracy for outcome in trials.outcomes(self._seeded("baseline", plain)))

    def _greedy(self, trials: Trials, least: float) -> list[int]:
        sizes = [self.full_size] * self.stages
        for count in reversed(range(1, self.stages)):
            smaller = [size for size in self.sizes if size < sizes[count]]
            wholes = {size: self.curriculum(*[size] * count, *sizes[count:]) for size in smaller}
            purpose = f"stages 1 to {count}" if count > 1 else "stage 1"
            means = _means(trials, {size: self._seeded(purpose, whole) for size, whole in wholes.items()})
            found = (size for size, accuracy in means if accuracy >= least)
            sizes[:count] = [next(found, sizes[count])] * count
        return sizes

    def _sequential(self, trials: Trials) -> list[int]:
        sizes: list[int] = []
        ends: list[Outcome] = []  # of the stages so far, for each seed
        for index in range(self.stages):
            trained, judged = {}, {}
            for size in self.sizes:
                with any_last_size():
                    whole = self.curriculum(*sizes, size)
                stage = self._seeded(f"stage {index + 1}", part(whole, index))
                trained[size] = [_after(*pair) for pair in zip(stage, ends, strict=True)] if ends else stage
            outcomes = trials.outcomes([trial for stage in trained.values() for trial in stage])
            stages = {size: [next(outcomes) for _ in stage] for size, stage in trained.items()}
            short = fine_tune_after(self.curriculum(*sizes), index, self.fine_tune)
            for size in self.sizes:
                judge = self._seeded(f"fine-tuned after stage {index + 1} at {size}", short)
                judged[size] = [_after(*pair) for pair in zip(judge, stages[size], strict=True)]
            means = dict(_means(trials, judged))
            best = max(means.values())
            sizes.append(next(size for size, accuracy in means.items() if accuracy >= best - self.tolerance))
            ends = stages[sizes[-1]]
        return sizes


def _means(trials: Trials, candidates: Mapping[int, Sequence[Trial]]) -> Iterator[tuple[int, float]]:
    """Each size with the mean accuracy of its trials; trials that nobody asks for may never be made."""
    outcomes = trials.outcomes([trial for group in candidates.values() for trial in group])
    for size, group in candidates.items():
        yield size, fmean(next(outcomes).accuracy for _ in group)


def _after(trial: Trial, outcome: Outcome) -> Trial:
    if outcome.checkpoint is None:
        given = f"trial {outcome.trial} returned no checkpoint"
        raise UserError(f"{given}: a sequential search needs (accuracy, path of a new checkpoint)")
    return replace(trial, parent=outcome.trial.key, from_checkpoint=outcome.checkpoint)


def search(
    train_fn: TrainFunction,
    *,
    budget: Number,
    sizes: Sequence[int] = (96, 128, 160, 192, 224),
    stages: int = 5,
    method: str = "greedy",
    workers: int = 1,
    runner: str | Executor | None = None,
    log: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    reporter: Any = None,
    **options: Any,
) -> Curriculum:
    """Find the input size of each stage of a training by trying.

    `train_fn(curriculum, from_checkpoint)` trains a model with all stages of `curriculum`, from a checkpoint that it
    wrote before, or from the beginning where that is None, and returns the accuracy at `curriculum.base_size`. It may
    have a parameter `seed`. In a sequential search it also writes its end (model and optimiser) as a new checkpoint,
    and returns (accuracy, path); its curricula are then stages, with their part of the learning-rate curve, and
    fine-tunings, in which the rate falls in a line from there. It need not tell one from the other.

    greedy: stages of equal epochs. From stage N - 1 down to the first, the smallest size no larger than the next
    stage's with which this stage and all before it still reach the accuracy of ordinary training. At most
    1 + (N - 1)(K - 1) full trainings of N stages and K sizes, times the repeats.

    The last stage has the full size.

    sequential: stages of equal compute. From the first to the last, every size is trained for the stage's compute from
    the end of the stages before; the one that is best after a short fine-tuning at full size stays, of equal ones the
    smallest. NK trainings of a stage, and as many fine-tunings, times the repeats: K(1 + N fine_tune) budgets together.

    The result does not depend on `workers`; with several, trials are begun that may
    turn out to be needless.

    Args:
        train_fn: see above.
        budget: of a whole training: epochs (greedy), or compute in epochs at the base size (sequential).
        sizes: candidates, ascending; the largest is the base size unless `base_size` is given.
        stages: N.
        method: greedy or sequential.
        workers: trials at a time.
        runner: serial; processes, which need a `train_fn` of a module's top level, have one thread each and take turns
            on the GPUs; ray, see `RayExecutor`; or any `concurrent.futures.Executor`, which stays open. None: processes
            where there are several workers.
        log: a file that gets a line for each trial, as JSON, and from which a stopped search goes on.
        settings: whatever else accuracies depend on (JSON values): a log of others is refused.
        reporter: shows progress: a `leap_shared.cli.Context`, or what has such `progress` and `log`.
        **options: fields of `Search`: base_size, magnitudes, tolerance, target, repeats, seed, fine_tune; and of
            `Curriculum`, such as batch or lr.

    Raises:
        UserError: a value is impossible, the train function or its result is of another form, or the log is of another
            search.
        RuntimeError: a trial failed; says which.
    """
    own = {entry.name for entry in fields(Search)} - {"changes"}
    changes = {name: value for name, value in options.items() if name not in own}
    given = {name: value for name, value in options.items() if name in own}
    made = Search(budget=budget, sizes=sizes, stages=stages, method=method, changes=changes, **given)
    result = made.run(train_fn, workers=workers, runner=runner, log=log, settings=settings, reporter=reporter)
    return result.curriculum
