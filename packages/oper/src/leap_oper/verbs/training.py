"""Verbs that train and evaluate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from leap_oper.verbs.data import DataCommand
from leap_shared.cli import Command, Context, Progress
from leap_shared.errors import UserError
from leap_shared.offline.algorithms import ALGORITHMS

__all__ = ["TRAIN", "Eval", "Sweep"]


@dataclass(frozen=True, kw_only=True)
class _Train(DataCommand):
    """Base of ``train ALGO``."""

    weights: Path | None = None
    """Priorities: what `weights` wrote, or the authors' .npy file; None trains on uniform batches."""
    iteration: int | None = None
    """Of OPER-A's weights; the last where none is given."""
    std: float | None = None
    """Stretch or shrink the weights to this standard deviation (the authors use 2 with OPER-A)."""
    eps: float = 0.1
    """Least weight after that."""
    decouple: bool = False
    """Prioritise the policy's terms alone; the critic sees uniform batches."""
    mode: Literal["resample", "reweight"] = "resample"
    """Draw by the weights, or multiply the losses by them."""
    top: float | None = None
    """Use only the rows of the best percent of returns."""
    seeds: int = 5
    """How many seeds, trained as one program; the first is --seed."""
    steps: int | None = None
    """Updates of each; None is the authors' number."""
    preset: str | None = None
    """D4RL task whose hyperparameters the authors of IQL or CQL give; flags go before them."""
    every: int = 5000
    """Updates between evaluations, records and checkpoints."""
    env: str | None = None
    """Gymnasium's name of the environment to evaluate in; None evaluates nothing."""
    episodes: int = 10
    """Episodes of each evaluation and seed."""
    batch_size: int | None = None
    """Rows of a batch; None is the authors' size."""
    sampler: Literal["alias", "cdf"] = "alias"
    """How rows are drawn."""
    rewards: Literal["recorded", "locomotion", "antmaze", "antmaze-cql"] = "recorded"
    """Rewards of the losses: as recorded, scaled by the range of returns, minus 1, or times 10 minus 5."""
    compile: bool = False
    """Run updates through torch.compile."""
    threads: int = 1
    """Threads of PyTorch."""

    def run(self, context: Context) -> object:
        """Train, or go on with the training."""
        import torch

        from leap_oper import recipes
        from leap_oper.trainer import Trainer

        torch.set_num_threads(self.threads)
        config: Any = self.algorithm  # type: ignore[attr-defined]
        default = type(config)()
        changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
        changed = {**recipes.preset(type(config), self.preset), **changed}
        if self.weights is None and (self.std is not None or self.iteration is not None or self.decouple):
            raise UserError("std, iteration and decouple are for priorities: give --weights too")
        dataset = recipes.chosen_rows(self.load(), self.top)
        trainer = Trainer(
            self.verb.split()[1],
            dataset,
            priorities=recipes.priorities(self.weights, dataset, self.iteration, self.std, self.eps),
            decouple=self.decouple,
            mode=self.mode,
            seeds=range(self.seed, self.seed + self.seeds),
            steps=self.steps,
            every=self.every,
            environment=self.env,
            keys=self.keys,
            episodes=self.episodes,
            task=self.task,
            name=Path(self.data).stem,
            batch_size=self.batch_size,
            sampler=self.sampler,
            rewards=recipes.REWARDS[self.rewards],
            compile=self.compile,
            out=context.out,
            device=str(context.device),
            **changed,
        )
        what = f"{self.verb}: updates of {self.seeds} seeds"
        bar: Progress[Any] = context.progress(description=what, total=trainer.steps)
        trainer.train(progress=lambda count, text: bar.advance(count, text=text))
        report = trainer.report()
        return report.to_json() if self.json else str(report)


def _verb(name: str) -> type[Command]:
    """The verb ``train NAME``, whose flags are those of every training and the fields of the algorithm's config."""
    kind, config = ALGORITHMS[name]
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    fields: Any = [
        ("verb", ClassVar[str], f"train {name}"),
        ("algorithm", Annotated[config, tyro.conf.arg(name="")], field(default_factory=config)),
    ]
    made = dataclasses.make_dataclass(f"Train{name}", fields, bases=(_Train,), frozen=True, kw_only=True)
    made.__doc__ = f"""Train {kind.__name__} with many seeds as one program; killed, it goes on.

    {summary}

    Examples:
        leap-oper train {name} data.npz --weights runs/weights/weights.npz --env Hopper-v5 --out runs/{name}
    """
    return made


TRAIN = tuple(_verb(name) for name in ALGORITHMS)


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Run the policies of a training in simulation.

    Examples:
        leap-oper eval runs/td3bc --env Hopper-v5 --episodes 100
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """What `train` wrote."""
    env: str
    """Gymnasium's name of the environment."""
    episodes: int = 10
    """Episodes of each seed."""
    task: str | None = None
    """D4RL task whose reference scores normalise the returns."""
    keys: tuple[str, ...] = ()
    """Of Dict observations, in the order in which the data joined them."""

    def run(self, context: Context) -> object:
        """Evaluate; one row per seed."""
        from leap_oper.report import Report
        from leap_oper.trainer import POLICIES
        from leap_shared.offline.policies import Policies
        from leap_shared.offline.scores import reference

        if self.task is not None:
            reference(self.task)
        policies = Policies.load(self.run_folder / POLICIES, context.device)
        returns = policies.returns(self.env, self.episodes, self.seed, keys=self.keys)
        algorithm = policies.algorithm
        history = [{"update": 0, "returns": returns.mean(axis=1).tolist()}]
        seeds = algorithm.seeds
        task, environment = self.task or self.env, self.env
        facts: dict[str, Any] = {"seeds": seeds, "history": history, "task": task, "environment": environment}
        report = Report.of(algorithm=algorithm.name, label="", **facts)
        rows = zip(seeds, returns, report.final, strict=True)
        return [{"seed": s, "return": r.mean(), "std": r.std(), "score": f, "unit": report.unit} for s, r, f in rows]


@dataclass(frozen=True, kw_only=True)
class Sweep(Command):
    """Train every combination of data sets, algorithms and methods; finished ones are not run again.

    Without --ray one after the other in this process; with it side by side on this machine, or on the cluster whose
    --address is given, which must share the output folder.

    Examples:
        leap-oper sweep --data a.npz b.npz --algorithms td3bc iql --methods uniform oper-r --env Hopper-v5
        leap-oper sweep --data a.npz --algorithms bc --methods uniform oper-r oper-a --ray
    """

    data: tuple[str, ...]
    """Data sets, as for `train`."""
    algorithms: tuple[str, ...] = ("td3bc",)
    """Algorithms."""
    methods: tuple[str, ...] = ("uniform", "oper-r")
    """uniform, oper-r or oper-a."""
    seeds: int = 5
    """How many seeds; the first is --seed."""
    steps: int | None = None
    """Updates of each run; None is the authors' number."""
    every: int = 5000
    """Updates between evaluations."""
    env: str | None = None
    """Gymnasium's name of the environment to evaluate in."""
    episodes: int = 10
    """Episodes of each evaluation and seed."""
    keys: tuple[str, ...] = ()
    """Of Dict observations, in the order in which they are joined."""
    root: Path | None = None
    """Folder with D4RL's or Minari's files."""
    base_prob: float = 0.0
    """Of OPER-R."""
    value_iterations: int = 5
    """Of OPER-A."""
    value_steps: int = 1_000_000
    """Updates of each iteration of OPER-A."""
    ray: bool = False
    """Run on Ray."""
    address: str | None = None
    """Of a running Ray cluster."""
    threads: int = 1
    """Threads of PyTorch of each run."""

    def run(self, context: Context) -> object:
        """Run what is not finished, then report."""
        from leap_oper.pages import write_report
        from leap_oper.sweep import cells, run_sweep

        names = (
            "steps",
            "every",
            "episodes",
            "keys",
            "root",
            "base_prob",
            "value_iterations",
            "value_steps",
            "threads",
        )
        settings = {name: getattr(self, name) for name in names}
        settings |= {"seeds": tuple(range(self.seed, self.seed + self.seeds)), "environment": self.env}
        chosen = cells(self.data, self.algorithms, self.methods, context.out, device=self.device, **settings)
        folders = run_sweep(chosen, ray=self.ray, address=self.address, note=context.log)
        return write_report(folders, context.out)
