"""What training runs scored: per seed, mean, interquartile mean, improvement over uniform sampling, beside CORL."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from leap_oper.priorities import Priorities
from leap_shared.errors import UserError
from leap_shared.experiment.statistics import Estimate
from leap_shared.offline.scores import labelled_score
from leap_shared.offline.statistics import bootstrap, probability_of_improvement

__all__ = ["RESULT", "Report", "collect", "corl_scores", "summarise"]

RESULT = "result.json"
LAST_EVALUATIONS = 10
CORL_NAMES = {"bc": "BC", "td3bc": "TD3+BC", "cql": "CQL", "iql": "IQL"}
BASELINE = "uniform"


@dataclass(frozen=True)
class Report:
    """Evaluations of one training run of several seeds.

    The final score of a seed is the mean of its last ten evaluations (or all, where there are fewer), 100 being the
    expert of the task's reference where there is one; else it is a return.
    """

    algorithm: str
    label: str
    task: str
    seeds: list[int]
    updates: list[int]
    returns: list[list[float]]
    """Mean return of each evaluation (outer) and seed (inner)."""
    priorities: list[dict[str, Any]] = field(default_factory=list)
    """Of each set of weights: deviation, effective share of the rows, and a histogram."""
    environment: str = ""
    """Where the policies were run; scores from other environments than D4RL's own stand beside no published ones."""

    @classmethod
    def of(
        cls,
        *,
        algorithm: str,
        label: str,
        task: str,
        seeds: Sequence[int],
        history: Sequence[Mapping[str, Any]],
        priorities: Sequence[Priorities] = (),
        environment: str = "",
    ) -> Report:
        """Report of a trainer's history."""
        rows = [record for record in history if "returns" in record]
        updates, returns = [row["update"] for row in rows], [list(row["returns"]) for row in rows]
        weights = [_weights(w) for w in priorities]
        return cls(algorithm, label, task, list(seeds), updates, returns, weights, environment)

    @cached_property
    def unit(self) -> str:
        """What the scores are: "D4RL", an environment's in D4RL's reference range, or "return"."""
        try:
            label = labelled_score(self.task, 0.0).label
        except UserError:
            return "return"
        return label if self.environment in ("", self.task) else f"{self.environment}, D4RL reference range"

    @cached_property
    def curve(self) -> Float64[np.ndarray, "evaluations seeds"]:
        """Scores of every evaluation."""
        returns = np.asarray(self.returns, dtype=np.float64).reshape(-1, len(self.seeds))
        return returns if self.unit == "return" else labelled_score(self.task, returns).score

    @property
    def final(self) -> Float64[np.ndarray, " seeds"]:
        """Final score of every seed.

        Raises:
            UserError: nothing was evaluated.
        """
        if not len(self.curve):
            raise UserError(f"{self.algorithm} ({self.label}) was never evaluated: train with an environment")
        scores: NDArray[np.float64] = self.curve[-LAST_EVALUATIONS:].mean(axis=0)
        return scores

    def iqm(self) -> Estimate:
        """Interquartile mean over seeds with its stratified-bootstrap interval."""
        return bootstrap(self.final[:, None])

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Report of a run's folder.

        Raises:
            UserError: the folder holds no result.
        """
        path = folder / RESULT
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no result of a training run ({error}): give folders that `train` wrote"
            ) from error

    def __str__(self) -> str:
        """A few lines for people."""
        if not len(self.curve):
            return f"{self.algorithm}, {self.label}: trained, never evaluated (give an environment)"
        seeds = ", ".join(f"seed {seed} {score:.1f}" for seed, score in zip(self.seeds, self.final, strict=True))
        iqm = self.iqm()
        interval = f"95% interval {iqm.low:.1f} to {iqm.high:.1f}" if len(self.seeds) > 1 else "one seed: no interval"
        spread = f"IQM {iqm.value:.1f} ({interval})"
        head = f"{self.algorithm}, {self.label}, {self.task or 'no task'} (score: {self.unit})"
        return f"{head}\n  {seeds}\n  mean {self.final.mean():.1f} ± {self.final.std():.1f}, {spread}"


def _weights(priorities: Priorities) -> dict[str, Any]:
    counts, edges = np.histogram(priorities.weights, bins=40)
    return {
        "std": priorities.std,
        "effective share": priorities.effective_sample_size / len(priorities),
        "counts": counts.tolist(),
        "edges": edges.tolist(),
    }


def corl_scores(task: str, algorithm: str) -> dict[str, tuple[float, float]]:
    """CORL's published scores of a task, {"last": (mean, std), "best": (mean, std)}; empty where there are none."""
    with files("leap_oper").joinpath("corl_scores.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    name = CORL_NAMES.get(algorithm)
    return {row["kind"]: (float(row["mean"]), float(row["std"])) for row in rows if row["algorithm"] == name}


def collect(folders: Sequence[Path]) -> list[Report]:
    """Reports of these folders and of all folders in them, in the order of their paths.

    Raises:
        UserError: there are none.
    """
    found = sorted({path.parent for folder in folders for path in Path(folder).rglob(RESULT)})
    if not found:
        raise UserError(
            f"no {RESULT} in {', '.join(map(str, folders)) or 'no folder'}: give folders that `train` wrote"
        )
    return [Report.read(folder) for folder in found]


def summarise(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One row per algorithm and method over all its tasks, and per task where there are several.

    Improvement is the probability that a run of the method beats one of uniform sampling on the same tasks.
    """
    rows: list[dict[str, Any]] = []
    evaluated = [report for report in reports if len(report.curve)]
    for algorithm, label in dict.fromkeys((report.algorithm, report.label) for report in evaluated):
        group = [report for report in evaluated if (report.algorithm, report.label) == (algorithm, label)]
        parts = [[report] for report in group]
        units = {report.unit for report in group}
        if len(group) > 1 and len(units) == 1 and units != {"return"}:  # returns of different tasks have no mean
            parts.append(group)
        rows += [_row(part, evaluated) for part in parts]
    return rows


def _table(reports: Sequence[Report]) -> Float64[np.ndarray, "runs tasks"] | None:
    """Final scores; None where tasks have different numbers of runs."""
    columns = [report.final for report in reports]
    return np.stack(columns, axis=1) if len({len(column) for column in columns}) == 1 else None


def _row(reports: Sequence[Report], known: Sequence[Report]) -> dict[str, Any]:
    first, tasks = reports[0], [report.task for report in reports]
    row: dict[str, Any] = {"algorithm": first.algorithm, "method": first.label}
    row |= {"task": first.task if len(reports) == 1 else f"{len(reports)} tasks", "score": first.unit}
    scores = _table(reports)
    if scores is None:
        return {**row, "mean": float(np.concatenate([r.final for r in reports]).mean()), "iqm": None}
    iqm = bootstrap(scores)
    row |= {"seeds": len(scores), "mean": float(scores.mean()), "std": float(scores.mean(axis=1).std())}
    row |= {"iqm": iqm.value, "iqm interval": [iqm.low, iqm.high] if len(scores) > 1 else None}
    row |= {"improvement": None, "improvement interval": None}
    rivals = [
        next((r for r in known if (r.algorithm, r.label, r.task) == (first.algorithm, BASELINE, task)), None)
        for task in tasks
    ]
    theirs = _table([r for r in rivals if r is not None]) if first.label != BASELINE and all(rivals) else None
    if theirs is not None:
        chance = probability_of_improvement(scores, theirs)
        row |= {"improvement": chance.value, "improvement interval": [chance.low, chance.high]}
    published = corl_scores(first.task, first.algorithm) if len(reports) == 1 and first.unit == "D4RL" else {}
    if published:
        row |= {f"CORL {kind}": list(pair) for kind, pair in published.items()}
    return row
