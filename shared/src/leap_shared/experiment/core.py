"""An experiment, its runs and what they say about the claim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from leap_shared.cli.context import Progress
from leap_shared.errors import UserError, did_you_mean
from leap_shared.experiment import report
from leap_shared.experiment.statistics import Estimate, difference, mean
from leap_shared.files import ensure_folder, write_text

__all__ = ["Experiment", "Result", "run"]

Outcome = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is claimed and how it is judged.

    The 95% interval of the difference method - baseline, counted in the claim's direction, gives the verdict:

    - not reproduced: the whole interval is below `smallest_effect`, the least difference that would matter;
    - reproduced: otherwise, the whole interval is above zero;
    - underpowered: anything else, and whatever has fewer than two seeds.

    Raises:
        UserError: `smallest_effect` is not positive, or method and baseline are the same.
    """

    name: str
    title: str
    claim: str
    baseline: str
    method: str
    metric: str
    smallest_effect: float
    unit: str = ""
    higher_is_better: bool = True
    paired: bool = True
    """Whether equal seeds share their data or their randomness, so that differences are taken seed by seed."""
    notes: tuple[str, ...] = ()
    """Honest caveats, shown in the report."""
    source: str = ""
    """The paper."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest_effect < math.inf:
            raise UserError(
                f"smallest_effect is {self.smallest_effect}: give the least difference that matters, above 0"
            )
        if self.method == self.baseline:
            raise UserError(f"method and baseline are both {self.method!r}: name two arms")

    def verdict(self, estimate: Estimate) -> str:
        """Verdict on a difference method - baseline, by the rule above."""
        low, high = (estimate.low, estimate.high) if self.higher_is_better else (-estimate.high, -estimate.low)
        if high < self.smallest_effect:
            return "not reproduced"
        return "reproduced" if low > 0 else "underpowered"


@dataclass(frozen=True)
class Result:
    """Outcomes by arm, seed and measured quantity, and what follows from them."""

    experiment: Experiment
    outcomes: Mapping[str, Mapping[int, Mapping[str, float]]]

    @classmethod
    def from_outcomes(cls, experiment: Experiment, outcomes: Mapping[str, Mapping[int, Outcome]]) -> Result:
        """Result of runs made elsewhere, for example all seeds in one batched program: ``{arm: {seed: outcome}}``.

        An outcome is the metric's value, or a mapping that holds it under the metric's name beside other quantities.

        Raises:
            UserError: an arm is missing, a value is not finite, or paired arms have different seeds.
        """
        for arm in (experiment.baseline, experiment.method):
            if not outcomes.get(arm):
                raise UserError(
                    f"experiment {experiment.name} has no outcomes of {arm!r}: {did_you_mean(arm, outcomes)}"
                )
        result = cls(
            experiment,
            {
                arm: {seed: _values(experiment, arm, seed, outcome) for seed, outcome in by_seed.items()}
                for arm, by_seed in outcomes.items()
            },
        )
        ours, theirs = set(outcomes[experiment.method]), set(outcomes[experiment.baseline])
        if experiment.paired and ours != theirs:
            raise UserError(f"paired arms need the same seeds: only one of them has {sorted(ours ^ theirs)}")
        return result

    def values(self, arm: str) -> list[float]:
        """The metric of one arm, in the order of its seeds."""
        return [values[self.experiment.metric] for _, values in sorted(self.outcomes[arm].items())]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the method."""
        return sorted(self.outcomes[self.experiment.method])

    @cached_property
    def estimate(self) -> Estimate:
        """Difference method - baseline."""
        experiment = self.experiment
        return difference(self.values(experiment.method), self.values(experiment.baseline), paired=experiment.paired)

    @property
    def verdict(self) -> str:
        """`reproduced`, `not reproduced` or `underpowered`, by the rule of :class:`Experiment`."""
        return self.experiment.verdict(self.estimate)

    def to_json(self) -> dict[str, Any]:
        """What ``demo --json`` prints; an interval is null where one seed shows no spread."""
        experiment = self.experiment
        arms = [
            {
                "arm": arm,
                "seeds": sorted(self.outcomes[arm]),
                "values": self.values(arm),
                **_interval(mean(self.values(arm))),
            }
            for arm in self.outcomes
        ]
        facts = {name: value for name, value in vars(experiment).items() if name != "notes"}
        notes = list(experiment.notes)
        if math.isclose(self.estimate.low, self.estimate.high, rel_tol=1e-9, abs_tol=1e-12):
            notes.append("Every seed gave the same difference, so the interval has no width and shows no uncertainty.")
        return {
            **facts,
            "notes": notes,
            "seeds": self.seeds,
            **_interval(self.estimate),
            "verdict": self.verdict,
            "arms": arms,
        }

    def write(self, folder: Path, figures: Sequence[tuple[Path, str, str]] = (), command: str | None = None) -> Path:
        """Write `section.json`, `section.html` and `arms.png`; see :func:`leap_shared.experiment.report.write`."""
        return report.write(self.to_json(), self.outcomes, folder, figures, command)


def _interval(estimate: Estimate) -> dict[str, Any]:
    finite = math.isfinite(estimate.low)
    return {"estimate": estimate.value, "interval": [estimate.low, estimate.high] if finite else None}


def _values(experiment: Experiment, arm: str, seed: int, outcome: Outcome) -> dict[str, float]:
    values = dict(outcome) if isinstance(outcome, Mapping) else {experiment.metric: outcome}
    if experiment.metric not in values:
        raise UserError(f"arm {arm!r} gave {', '.join(values)} but not the metric {experiment.metric!r}")
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} of arm {arm!r}, seed {seed}, is {value}: a run must end with a finite number")
    return {name: float(value) for name, value in values.items()}


def run(
    experiment: Experiment,
    arms: Mapping[str, Callable[[int], Outcome]],
    seeds: Iterable[int],
    progress: Progress[Any] | None = None,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Run every arm with every seed and judge the claim.

    With a `folder` each outcome is kept in its `outcomes.jsonl` as soon as it is there, and an experiment that was
    killed goes on where it stopped. `settings` are whatever else the outcomes depend on (JSON values).

    Raises:
        UserError: an arm is missing, a value is not finite, or the folder holds outcomes of other settings.
    """
    for arm in (experiment.baseline, experiment.method):
        if arm not in arms:
            raise UserError(f"experiment {experiment.name} has no arm {arm!r}: {did_you_mean(arm, arms)}")
    seeds = list(seeds)
    head = {"experiment": experiment.name, "metric": experiment.metric, "settings": dict(settings or {})}
    path, done = None, {}
    if folder is not None:
        ensure_folder(folder)
        path = folder / "outcomes.jsonl"
        done = _finished(path, head)
    for seed in seeds:
        for arm, function in arms.items():
            if (arm, seed) not in done:
                done[arm, seed] = _values(experiment, arm, seed, function(seed))
                if path is not None:
                    rows = [{"arm": arm, "seed": seed, "values": values} for (arm, seed), values in done.items()]
                    write_text(path, "".join(json.dumps(row) + "\n" for row in [head, *rows]))
            if progress is not None:
                progress.advance(1, text=f"{arm}, seed {seed}: {done[arm, seed][experiment.metric]:.4g}")
    return Result.from_outcomes(experiment, {arm: {seed: done[arm, seed] for seed in seeds} for arm in arms})


def _finished(path: Path, head: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, float]]:
    if not path.exists():
        return {}
    try:
        found, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        done = {(row["arm"], row["seed"]): row["values"] for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it to start again") from error
    if found != json.loads(json.dumps(head)):
        raise UserError(
            f"{path} holds outcomes of another run ({found}), not of this one ({dict(head)}): "
            "give another --out, or delete that file to start again"
        )
    return done
