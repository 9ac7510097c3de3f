"""The case studies of the paper: many runs of one algorithm, with priorities, as one resumable program."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leap_oper.priorities import Priorities
from leap_oper.report import RESULT, Report
from leap_oper.samplers import AliasSampler, CdfSampler
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import ensure_folder, write_json
from leap_shared.offline import Transitions
from leap_shared.offline.algorithms import ALGORITHMS
from leap_shared.offline.policies import EVALUATION_SEED, Policies
from leap_shared.offline.rows import Rewards, Rows, known_next_actions
from leap_shared.offline.scores import reference
from leap_shared.offline.simulation import make_environment
from leap_shared.offline.training import IndexSampler, Training, UniformSampler

__all__ = ["POLICIES", "Trainer"]

MODES = ("resample", "reweight")
SAMPLERS = {"alias": AliasSampler, "cdf": CdfSampler}
POLICIES = "policies.safetensors"
STEPS = {"bc": 500_000, "td3bc": 1_000_000, "onestep": 2_600_000, "cql": 1_000_000, "iql": 1_000_000}
PHASES = {"behaviour_updates": 500_000, "q_updates": 2_000_000, "policy_updates": 100_000}  # of one-step
BATCHES = {"bc": 512, "onestep": 512}
FLAGS = ("reweight", "reweight_eval", "reweight_improve", "reweight_constraint")


class Trainer:
    """Trains one algorithm with several seeds at once: ``Trainer("td3bc", data, priorities=w).train()``.

    Resampling draws the batches by the priorities; reweighting draws uniformly and multiplies the losses. Decoupled,
    only the terms that tie the policy to the data are prioritised, and the critic keeps seeing the uniform data.

    Args:
        algorithm: bc, td3bc, onestep, cql or iql.
        dataset: the transitions, or one set per seed.
        priorities: of the rows, or one per seed (None: uniform).
        decouple: prioritise the policy's terms alone ("two sampler").
        mode: resample or reweight.
        seeds: of the runs; hyperparameters may be tuples with one value per run.
        steps: updates of every run; None: the authors' number. One-step's phases share them in the authors' proportion
            unless their lengths are given, and IQL's learning rate ends with them.
        out: folder of checkpoints, result.json and policies.safetensors; None keeps nothing.
        device: auto, cpu, cuda, ...
        sampler: alias or cdf.
        batch_size: rows of a batch; None: 512 for bc and onestep, else 256.
        environment: gymnasium's name, or what makes one, for evaluations in simulation; None: no evaluation.
        keys: of Dict observations, in the order in which the data joined them.
        task: D4RL task whose reference scores normalise the returns; None: the environment's where it is known.
        name: what reports call the data where there is no task.
        every: updates between two evaluations, records and checkpoints.
        episodes: of each run and evaluation.
        evaluate: your own evaluation, in place of `environment`: plain values for the record of the history; those
            under "returns" (one per run) are the curve of the report.
        normalise: bring states to mean 0 and deviation 1; None: as the algorithm's authors do.
        rewards: takes the place of the recorded rewards, which priorities always see.
        compile: run the update through `torch.compile`. On a CPU the written-out step is as fast without it (the README
            has the numbers), and results differ in the last bits.
        label: name of the method in reports; None: made of the priorities, mode and decoupling.
        **options: hyperparameters, fields of the algorithm's config.

    Raises:
        UserError: a name is unknown, priorities belong to other data, or modes contradict each other.
    """

    def __init__(
        self,
        algorithm: str,
        dataset: Transitions | Sequence[Transitions],
        *,
        priorities: Priorities | Sequence[Priorities | None] | None = None,
        decouple: bool = False,
        mode: str = "resample",
        seeds: Sequence[int] = range(5),
        steps: int | None = None,
        out: Path | str | None = None,
        device: str = "auto",
        sampler: str = "alias",
        batch_size: int | None = None,
        environment: str | Callable[[], Any] | None = None,
        keys: Sequence[str] = (),
        task: str | None = None,
        name: str = "",
        every: int = 5000,
        episodes: int = 10,
        evaluate: Callable[[Trainer], dict[str, Any]] | None = None,
        normalise: bool | None = None,
        rewards: Rewards | None = None,
        compile: bool = False,  # noqa: A002 - the name that users know
        label: str | None = None,
        **options: Any,
    ) -> None:
        for what, word, known in (
            ("algorithm", algorithm, ALGORITHMS),
            ("mode", mode, MODES),
            ("sampler", sampler, SAMPLERS),
        ):
            if word not in known:
                raise UserError(f"{what} {word!r} is unknown: {did_you_mean(word, known)}")
        if task is not None:
            reference(task)
        steps = STEPS[algorithm] if steps is None else steps
        if min(steps, every, episodes) < 1 or not seeds:
            raise UserError(
                f"steps={steps}, every={every}, episodes={episodes}, seeds={list(seeds)}: give at least 1 of each"
            )
        runs, where = len(seeds), resolve_device(device)
        datasets = [dataset] * runs if isinstance(dataset, Transitions) else list(dataset)
        given: list[Priorities | None]
        given = [priorities] * runs if priorities is None or isinstance(priorities, Priorities) else list(priorities)
        if len(datasets) != runs or len(given) != runs:
            raise UserError(
                f"{len(datasets)} data sets and {len(given)} priorities for {runs} seeds: give one each, or one"
            )
        for data, weights in zip(datasets, given, strict=True):
            if weights is not None:
                weights.check(data)
        kind, config_kind = ALGORITHMS[algorithm]
        options = {**_lengths(algorithm, steps, options), **options}
        config = _config(config_kind, options, mode if any(w is not None for w in given) else "resample", decouple)
        widths = datasets[0].observations.shape[1], datasets[0].actions.shape[1]
        if environment is not None:
            _check_environment(environment, tuple(keys), widths)
        batch_size = BATCHES.get(algorithm, 256) if batch_size is None else batch_size
        if batch_size > min(map(len, datasets)):
            rows = min(map(len, datasets))
            warnings.warn(f"a batch of {batch_size} is drawn from {rows} rows: rows repeat", stacklevel=2)
        self.algorithm = kind(*widths, list(seeds), config, where)
        weighed = {id(w): w.probs * len(w) for w in given if w is not None}
        normalise = self.algorithm.normalises_states if normalise is None else normalise
        self.rows = Rows(
            datasets,
            where,
            normalise=normalise,
            rewards=rewards,
            weights=[w if w is None else weighed[id(w)] for w in given] if mode == "reweight" else None,
            next_actions=kind.needs_next_actions,
        )
        build = _Samplers(SAMPLERS[sampler], where, known_next_actions if kind.needs_next_actions else None)
        uniform = [build(data, None, seed) for data, seed in zip(datasets, seeds, strict=True)]
        chosen = [build(data, w, seed + (1 << 32)) for data, w, seed in zip(datasets, given, seeds, strict=True)]
        resampled = mode == "resample" and any(w is not None for w in given)
        self.label = label or _label(given, mode, decouple=decouple)
        self.task, self.name = task, name
        self.environment, self.keys, self.episodes = environment, tuple(keys), episodes
        self._own_evaluation = evaluate
        self.steps, self.every, self.out = steps, every, None if out is None else Path(out)
        self.training = Training(
            self.algorithm,
            self.rows,
            chosen if resampled and not decouple else uniform,
            chosen if resampled and decouple else None,
            batch_size=batch_size,
            settings=self._settings(datasets, given, rewards, batch_size, sampler, mode, decouple, compile, normalise),
        )
        if compile:
            vars(self.algorithm)["update"] = torch.compile(self.algorithm.update)
        self._priorities = list({id(w): w for w in given if w is not None}.values())

    def _settings(
        self, datasets: Sequence[Transitions], given: Sequence[Any], rewards: Rewards | None, *options: Any
    ) -> dict[str, Any]:
        def digest(array: Any) -> str:
            return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

        prints = [data.fingerprint + ("" if rewards is None else digest(rewards(data))) for data in datasets]
        weights = [w if w is None else digest(w.probs) for w in given]
        shown = {"algorithm": self.algorithm.name, "config": dataclasses.asdict(self.algorithm.config)}
        return {**shown, "seeds": self.algorithm.seeds, "data": prints, "weights": weights, "options": list(options)}

    @property
    def policies(self) -> Policies:
        """The policies as they are now."""
        return Policies(self.algorithm, self.rows.mean, self.rows.std)

    def train(
        self, *, resume: bool = True, progress: Callable[[int, str], object] | None = None
    ) -> list[dict[str, Any]]:
        """Train to `steps` updates, evaluate every `every`, and keep everything in `out`.

        Args:
            resume: go on with the run that `out` holds; with False a folder that holds one is refused.
            progress: called with the number of updates done and a word on them.

        Returns:
            The history: a record for every `every` updates.

        Raises:
            UserError: a loss is not finite, or `out` holds another run.
        """
        folder = None if self.out is None else ensure_folder(self.out) / "checkpoints"
        if folder is not None and not resume and folder.exists() and any(folder.glob("step-*")):
            raise UserError(f"{self.out} holds a run already: resume it, or give another folder")

        def note(count: int, text: str) -> None:
            if self.out is not None:
                write_json(self.out / RESULT, self.report().to_json())
            if progress is not None:
                progress(count, text)

        silent = self.environment is None and self._own_evaluation is None
        evaluate = None if silent else self._evaluate
        history = self.training.train(self.steps, every=self.every, out=folder, evaluate=evaluate, progress=note)
        if self.out is not None:
            self.policies.save(self.out / POLICIES)
            write_json(self.out / RESULT, self.report().to_json())
        return history

    def _evaluate(self, _: Training) -> dict[str, Any]:
        if self._own_evaluation is not None:
            return self._own_evaluation(self)
        options = {"keys": self.keys} if isinstance(self.environment, str) else {}
        returns = self.policies.returns(self.environment or "", self.episodes, EVALUATION_SEED, **options)
        return {"returns": returns.mean(axis=1).tolist()}

    def report(self) -> Report:
        """Scores so far: per seed, mean, IQM with its interval; see :class:`leap_oper.report.Report`."""
        environment = self.environment if isinstance(self.environment, str) else ""
        return Report.of(
            algorithm=self.algorithm.name,
            label=self.label,
            task=self.task or self.name or environment,
            environment=environment,
            seeds=self.algorithm.seeds,
            history=self.training.history,
            priorities=self._priorities,
        )


def _check_environment(environment: str | Callable[[], Any], keys: tuple[str, ...], widths: tuple[int, int]) -> None:
    """Make it once, so that what is wrong with it is said before work starts."""
    made = make_environment(environment, keys) if isinstance(environment, str) else environment()
    found = made.observation_space.shape[0], made.action_space.shape[0]
    made.close()
    if found != widths:
        raise UserError(f"the environment has observation and action widths {found}, the data {widths}: give its own")


@dataclasses.dataclass(frozen=True)
class _Samplers:
    """Makes each run's sampler; runs of equal priorities share the tables."""

    kind: Callable[..., Any]
    device: torch.device
    allowed: Callable[[Transitions], NDArray[np.bool_]] | None
    made: dict[tuple[int, int], Any] = dataclasses.field(default_factory=dict)

    def __call__(self, data: Transitions, priorities: Priorities | None, seed: int) -> IndexSampler:
        mask = None if self.allowed is None else self.allowed(data)
        if priorities is None:
            rows = None if mask is None or mask.all() else torch.from_numpy(np.flatnonzero(mask))
            return UniformSampler(len(data), self.device, seed, rows)
        key = (id(data), id(priorities))
        if key not in self.made:
            probs = priorities.probs if mask is None else priorities.probs * mask
            if not probs.any():
                raise UserError("no row with a known next action has a positive weight: give other priorities")
            self.made[key] = self.kind(probs, self.device)
        sampler: IndexSampler = copy.copy(self.made[key])
        sampler.generator = torch.Generator(self.device).manual_seed(seed)
        return sampler


def _lengths(algorithm: str, steps: int, options: Mapping[str, Any]) -> dict[str, int]:
    """Hyperparameters that follow from the number of updates."""
    if algorithm == "iql":
        return {"schedule_steps": steps}
    if algorithm != "onestep" or any(name in options for name in PHASES):
        return {}
    first, second = (max(1, steps * PHASES[name] // STEPS["onestep"]) for name in ("behaviour_updates", "q_updates"))
    if steps < 3:
        raise UserError(f"steps={steps}: one-step has three phases, give at least 3")
    return {"behaviour_updates": first, "q_updates": second, "policy_updates": steps - first - second}


def _config(kind: Any, options: Mapping[str, Any], mode: str, decouple: bool) -> Any:
    """The algorithm's config with the flags that `mode` and `decouple` stand for."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise UserError(f"{kind.__name__} has no field {name!r}: {did_you_mean(name, known)}")
    flags = {name: options[name] for name in FLAGS if options.get(name)}
    if mode == "resample":
        if flags:
            raise UserError(f"{', '.join(flags)} with mode='resample': resample and reweight exclude each other")
        return kind(**options)
    wanted = {name: not (decouple and name == "reweight_eval") for name in FLAGS if name in known}
    return kind(**{**wanted, **options})


def _label(priorities: Sequence[Priorities | None], mode: str, *, decouple: bool) -> str:
    methods = {"uniform" if w is None else str(w.meta.get("method", "weights")) for w in priorities}
    if methods == {"uniform"}:
        return "uniform"
    return " ".join([" and ".join(sorted(methods)), mode, *(["decoupled"] if decouple else [])])
