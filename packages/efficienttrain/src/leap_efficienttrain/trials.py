"""Trainings that a search asks for: several at a time, each written down as soon as it has ended."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from leap_efficienttrain.curriculum import Curriculum
from leap_shared.errors import UserError
from leap_shared.files import ensure_folder, write_text

__all__ = ["Outcome", "TrainFunction", "Trial", "TrialLog", "Trials", "takes_seed"]

TrainFunction = Callable[..., Any]
"""`train(curriculum, from_checkpoint) -> accuracy`, or (accuracy, checkpoint); see `leap_efficienttrain.search`."""


@dataclass(frozen=True)
class Trial:
    """One call of the train function.

    Attributes:
        purpose: of it in the search, in words.
        curriculum: what it trains.
        seed: for the train function, where that takes one.
        parent: key of the trial that made `from_checkpoint`.
        from_checkpoint: what the training goes on from; None: from the beginning.
    """

    purpose: str
    curriculum: Curriculum
    seed: int = 0
    parent: str | None = None
    from_checkpoint: str | None = None

    @cached_property
    def key(self) -> str:
        """Digest of the curriculum, the seed and the parent."""
        text = json.dumps([self.curriculum.to_yaml(), self.seed, self.parent])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def cost(self) -> float:
        """Of the training, in epochs at the base size."""
        curriculum = self.curriculum
        if curriculum.unit == "compute":
            return float(curriculum.equivalent_epochs)
        areas = (stage.share * stage.size * stage.size for stage in curriculum.stages)
        return curriculum.equivalent_epochs * math.fsum(areas) / (curriculum.base_size * curriculum.base_size)

    def __str__(self) -> str:
        """Its purpose, sizes and seed."""
        sizes = ", ".join(str(stage.size) for stage in self.curriculum.stages)
        return f"{self.purpose}: sizes {sizes}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """A trial and what came of it.

    Attributes:
        trial: what was done.
        accuracy: as the train function counts it; more is better.
        checkpoint: that the train function wrote, if it said so.
        seconds: that it took, on whatever machine it ran.
    """

    trial: Trial
    accuracy: float
    checkpoint: str | None
    seconds: float


def _call(
    function: TrainFunction, curriculum: Curriculum, from_checkpoint: str | None, options: Mapping[str, Any]
) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(curriculum, from_checkpoint, **options)
    return result, time.perf_counter() - start


def takes_seed(function: TrainFunction) -> bool:
    """Whether a train function has a parameter `seed`.

    Raises:
        UserError: it does not take a curriculum and a checkpoint.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables in C have none
        return False
    kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
    seeds = kinds.get("seed", inspect.Parameter.POSITIONAL_ONLY) is not inspect.Parameter.POSITIONAL_ONLY
    seeds = seeds or inspect.Parameter.VAR_KEYWORD in kinds.values()
    try:
        signature.bind(None, None, **({"seed": 0} if seeds else {}))
    except TypeError as error:
        expected = "expected train(curriculum, from_checkpoint) or train(curriculum, from_checkpoint, seed)"
        raise UserError(f"a train function {signature} cannot be called ({error}): {expected}") from error
    return seeds


class TrialLog:
    """Outcomes in a file, a JSON line each, below a first line that says which search they belong to.

    Each line is on the disk before the search goes on; one that a killed run left unfinished is removed.

    Args:
        path: of the file, made where it does not exist. None: nothing is kept.
        head: JSON values that every run with this file must have in common.

    Raises:
        UserError: the file is damaged, belongs to another search, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, head: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        ensure_folder(self.path.parent)
        text = _text(self.path)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        if not whole:
            _append(self.path, {"search": dict(head)})
            return
        try:
            first, *rows = map(json.loads, whole.splitlines())
            found = dict(first["search"])
            self.rows = {row["key"]: {**row, "accuracy": float(row["accuracy"])} for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it to start again") from error
        if odd := _differences(json.loads(json.dumps(head)), found):
            hint = "give another log, or delete that file to start again"
            raise UserError(f"{self.path} holds trials of another search ({'; '.join(odd)}): {hint}")

    def outcome(self, trial: Trial) -> Outcome | None:
        """What the file says of a trial."""
        row = self.rows.get(trial.key)
        return None if row is None else Outcome(trial, row["accuracy"], row.get("checkpoint"), row.get("seconds", 0.0))

    def add(self, outcome: Outcome) -> None:
        """Write an outcome down."""
        if self.path is None:
            return
        trial = outcome.trial
        row = {
            "key": trial.key,
            "purpose": trial.purpose,
            "sizes": [stage.size for stage in trial.curriculum.stages],
            "seed": trial.seed,
            "parent": trial.parent,
            "accuracy": outcome.accuracy,
            "checkpoint": outcome.checkpoint,
            "seconds": round(outcome.seconds, 3),
            "curriculum": trial.curriculum.to_yaml(),
        }
        _append(self.path, row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        with path.open("ab") as file:
            file.write((json.dumps(row, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _text(path: Path) -> str:
    try:
        # a line that was never finished may end inside a character
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    odd = []
    for name in dict.fromkeys([*now, *then]):
        ours, theirs = now.get(name), then.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            odd += _differences(ours, theirs)
        elif ours != theirs:
            odd.append(f"{name} is {ours}, was {theirs}")
    return odd


class Trials:
    """Runs trials, `workers` at a time, unless the log knows their outcome already.

    Attributes:
        used: outcomes that were asked for, in order.

    Args:
        function: the train function.
        executor: where it runs; shut down in the end where `is_mine`.
        workers: trials at a time.
        log: where outcomes are kept.
        reporter: shows progress: a `leap_shared.cli.Context`, or what has such `progress` and `log`.
        is_mine: whether the executor was made for these trials.

    Raises:
        UserError: the train function has other parameters than it should.
    """

    def __init__(
        self,
        function: TrainFunction,
        executor: Executor,
        workers: int,
        log: TrialLog,
        reporter: Any = None,
        is_mine: bool = True,
    ) -> None:
        self.used: list[Outcome] = []
        self._seeds = takes_seed(function)
        self._function, self._executor, self._workers, self._log = function, executor, workers, log
        self._bar = reporter.progress(description="trials") if reporter is not None else None
        self._is_mine = is_mine
        self._running: dict[Future[Any], Trial] = {}
        self._ended: dict[str, Outcome | Exception] = {}

    def close(self) -> None:
        """Wait for the trials that still run, and write them down too."""
        while self._running:
            self._collect()
        if self._is_mine:
            self._executor.shutdown()
        if self._bar is not None:
            self._bar.end()

    def outcomes(self, trials: Sequence[Trial]) -> Iterator[Outcome]:
        """Outcomes in the order of the trials. What is not asked for is begun only where a worker would be idle.

        Raises:
            RuntimeError: a trial failed; says which.
            UserError: the same, where the train function raised one or returned no finite number.
        """
        for index, trial in enumerate(trials):
            while (outcome := self._outcome(trial)) is None:
                for ahead in trials[index:]:
                    if len(self._running) < self._workers and self._outcome(ahead) is None:
                        self._begin(ahead)
                self._collect()
            if not isinstance(outcome, Outcome):
                raise outcome
            self.used.append(outcome)
            yield outcome

    def _outcome(self, trial: Trial) -> Outcome | Exception | None:
        if trial.key not in self._ended and (logged := self._log.outcome(trial)):
            self._ended[trial.key] = logged
        return self._ended.get(trial.key)

    def _begin(self, trial: Trial) -> None:
        if trial.key not in {running.key for running in self._running.values()}:
            options = {"seed": trial.seed} if self._seeds else {}
            call = (self._function, trial.curriculum, trial.from_checkpoint, options)
            try:
                self._running[self._executor.submit(_call, *call)] = trial
            except BrokenExecutor as error:
                self._ended[trial.key] = _failure(trial, error)

    def _collect(self) -> None:
        """Wait until a trial ends, and keep its outcome or its failure."""
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            trial = self._running.pop(future)
            if error := future.exception():
                self._ended[trial.key] = _failure(trial, error)
                continue
            try:
                outcome = self._ended[trial.key] = _read(trial, *future.result())
            except UserError as error:
                self._ended[trial.key] = error
                continue
            self._log.add(outcome)
            if self._bar is not None:
                self._bar.advance(1, text=f"{trial}: {outcome.accuracy:.4g}")


def _read(trial: Trial, result: Any, seconds: float) -> Outcome:
    accuracy, checkpoint = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    try:
        value = float(accuracy)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"trial {trial} returned {result!r}: expected a finite accuracy, or (accuracy, checkpoint)")
    return Outcome(trial, value, None if checkpoint is None else str(checkpoint), seconds)


def _failure(trial: Trial, error: BaseException) -> Exception:
    """The error to raise in its place, which says which trial it was."""
    failure: Exception
    if isinstance(error, UserError):
        failure = UserError(f"trial {trial}: {error}")
    elif isinstance(error, BrokenExecutor):
        hint = 'out of memory, or a script without `if __name__ == "__main__":` around its search'
        failure = RuntimeError(f"the process of trial {trial} ended: {hint}")
    else:
        failure = RuntimeError(f"trial {trial} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
