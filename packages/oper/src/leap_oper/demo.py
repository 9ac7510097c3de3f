"""The paper's idea in small: PointMaze data, behaviour cloning with and without priorities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_oper import figures, recorded
from leap_oper.advantages import ValueFit, iterate
from leap_oper.bandit import bandit, iterations
from leap_oper.priorities import Priorities, oper_r
from leap_oper.trainer import Trainer
from leap_shared.cli import Context, Progress
from leap_shared.errors import UserError
from leap_shared.experiment import Experiment, Result, join
from leap_shared.files import ensure_folder
from leap_shared.offline import Evaluation, PointMaze, Transitions, evaluate, generate

__all__ = ["Settings", "run"]

UNIFORM, OPER_R, OPER_A = "uniform BC", "OPER-R", "OPER-A"


CLAIM = Experiment(
    name="oper",
    title="Offline prioritised experience replay: cloning from a mixture",
    claim="Behaviour cloning on batches drawn by trajectory returns (OPER-R) earns more than on uniform batches.",
    baseline=UNIFORM,
    method=OPER_R,
    metric="mean return",
    unit="steps at the goal",
    smallest_effect=10.0,
    source="Offline Prioritized Experience Replay",
)
CONTROL_TITLE = "OPER-R where returns are luck"
CONTROL_CLAIM = "Priorities from returns (OPER-R) also help where every episode comes from one and the same behaviour."
CONTROL_NOTE = (
    "The control: all episodes head for the goal under the same noisy controller, so returns differ by luck and no "
    "benefit is expected. `Not reproduced` is the outcome that a sound method should have here."
)
MIXTURE_NOTE = (
    "The mixture favours return filtering by construction: 30% of its episodes head for the goal and hardly any other "
    "episode earns a reward, so returns separate good behaviour from aimless behaviour."
)
PAPER_UPDATES = "the paper's recipe is 5 x 1,000,000, and on rewards this sparse the values are far from converged"
SMOKE_NOTE = "This was --quick, a smoke test that everything runs: its sizes can support no conclusion."


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are what the README reports."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    episodes: int = 120
    updates: int = 2000
    value_iterations: int = 3
    value_updates: int = 1500
    evaluation_episodes: int = 10
    curve_points: int = 4
    curve_episodes: int = 3
    full: bool = False
    """Whether TD3+BC and IQL are trained too, on recorded medium-replay data."""
    smoke: bool = False
    """Whether this only shows that everything runs: too small to say anything about the claim."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise UserError("there are no seeds: give at least one")

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """About ten seconds."""
        sizes: dict[str, Any] = {
            "updates": 300,
            "value_iterations": 2,
            "value_updates": 40,
            "curve_points": 1,
            "curve_episodes": 1,
        }
        return cls(seeds=(seed, seed + 1), episodes=16, evaluation_episodes=2, smoke=True, **sizes)


@dataclass(frozen=True)
class Study:
    """One kind of data set: what was measured on it, arm by arm, in the order of the seeds."""

    maze: PointMaze
    datasets: list[Transitions]
    priorities: dict[str, list[Priorities]]
    evaluations: dict[str, list[Evaluation]]
    steps: list[int] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)

    def result(self, experiment: Experiment, seeds: Sequence[int]) -> Result:
        """What the evaluations say about a claim."""
        outcomes = {
            arm: {
                seed: {"mean return": float(e.returns.mean()), "success": float(e.success.mean())}
                for seed, e in zip(seeds, group, strict=True)
            }
            for arm, group in self.evaluations.items()
        }
        return Result.from_outcomes(experiment, outcomes)


def _study(name: str, maze: PointMaze, settings: Settings, work: Path, context: Context, *, with_a: bool) -> Study:
    seeds = settings.seeds
    folder = ensure_folder(work / f"{name}-seeds-{seeds[0]}-to-{seeds[-1]}")
    task: Progress[Any] = context.progress(description=f"{name}: simulate the data", total=maze.episodes * len(seeds))
    datasets = [generate(maze, seed, work / f"{name}-{seed}.npz", task.advance) for seed in seeds]
    priorities = {OPER_R: [oper_r(data) for data in datasets]}
    if with_a:
        total = settings.value_iterations * settings.value_updates
        task = context.progress(description=f"{name}: OPER-A fits its values", total=total)
        fit = ValueFit(datasets, seeds, device=context.device)
        weights = iterate(
            fit,
            iters=settings.value_iterations,
            steps=settings.value_updates,
            out=folder / "values",
            progress=task.advance,
        )
        priorities[OPER_A] = [Priorities(row[-1]) for row in weights]
    arms: Mapping[str, Sequence[Priorities | None]] = {UNIFORM: [None] * len(seeds), **priorities}
    count, runs = len(seeds), len(seeds) * len(arms)

    def run_policies(trainer: Trainer, episodes: int, progress: Any = None) -> list[Evaluation]:
        starts = [10_000 + episode for episode in range(episodes)]
        return evaluate([trainer.policies.policy(index) for index in range(runs)], maze, starts, progress)

    def point(trainer: Trainer) -> dict[str, Any]:
        return {"returns": [float(e.returns.mean()) for e in run_policies(trainer, settings.curve_episodes)]}

    task = context.progress(description=f"{name}: clone {runs} policies at once", total=settings.updates)
    trainer = Trainer(
        "bc",
        datasets * len(arms),
        priorities=[weights for group in arms.values() for weights in group],
        seeds=list(seeds) * len(arms),
        steps=settings.updates,
        every=settings.updates // settings.curve_points,
        evaluate=point,
        out=folder / "policies",
        device=str(context.device),
        batch_size=256,
        normalise=True,
        policy="deterministic",
        hidden=(128, 128),
        learning_rate=1e-3,
    )
    history = trainer.train(progress=lambda done, _: task.advance(done))
    task = context.progress(description=f"{name}: run the policies", total=runs)
    found = run_policies(trainer, settings.evaluation_episodes, task.advance)
    split = {arm: slice(i * count, (i + 1) * count) for i, arm in enumerate(arms)}
    returns = np.array([record["returns"] for record in history])
    return Study(
        maze,
        datasets,
        priorities,
        {arm: found[part] for arm, part in split.items()},
        [record["update"] for record in history],
        {arm: returns[:, part] for arm, part in split.items()},
    )


def run(settings: Settings, context: Context) -> dict[str, Any]:
    """Run the experiment and its control, write the section and its figures to `context.out`; killed, it goes on.

    Returns:
        The result as JSON values, with those of the control and the bandit beside them.
    """
    out = context.out
    work = ensure_folder(out / ("work-quick" if settings.smoke else "work"))
    mixture = _study("mixture", PointMaze(episodes=settings.episodes), settings, work, context, with_a=True)
    equals = PointMaze(episodes=settings.episodes, goal_fraction=1.0)
    control = _study("control", equals, settings, work, context, with_a=False)
    toy = iterations(bandit(settings.seeds[0]))
    doubt = replace(CLAIM, name="oper-control", title=CONTROL_TITLE, claim=CONTROL_CLAIM, notes=(CONTROL_NOTE,))
    control_result = control.result(doubt, settings.seeds)
    found = control_result.to_json()
    reached = f"{found['estimate']:+.1f} (95% interval {_interval(found['interval'])}), {found['verdict']}"
    rewards = ", ".join(f"{row.mean_reward:.2f} (published {row.published_mean_reward:.2f})" for row in toy)
    notes = (
        *((SMOKE_NOTE,) if settings.smoke else ()),
        MIXTURE_NOTE,
        f"Control, where all episodes head for the goal: {OPER_R} - {UNIFORM} = {reached}; no benefit was expected.",
        f"{OPER_A} fits values for {settings.value_iterations} x {settings.value_updates} updates; {PAPER_UPDATES}.",
        f"Bandit, mean reward after each iteration: {rewards}.",
    )
    result = mixture.result(replace(CLAIM, notes=notes), settings.seeds)
    control_result.write(out / "control")
    result.write(out, figures=_pictures(out, mixture, control, toy, found["verdict"]))
    context.log(f"{result.verdict}; the report is {out / 'section.html'}")
    told = {**result.to_json(), "control": found, "bandit": [asdict(row) for row in toy]}
    if not settings.full:
        return told
    found_too = recorded.run(settings.seeds, recorded.Recorded(), out / "full", context)
    join([out, *(out / "full" / name for name in found_too)], out)
    context.log(f"the page of all experiments is {out / 'index.html'}")
    return told | {"full": {name: one.to_json() for name, one in found_too.items()}}


def table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `run` returned as rows for people: the arms of both data sets, then the two differences."""
    rows = []
    for name, facts in {"mixture": result, "control": result["control"], **result.get("full", {})}.items():
        difference = {**facts, "arm": f"{facts['method']} - {facts['baseline']}: {facts['verdict']}"}
        for arm in [*facts["arms"], difference]:
            rows.append({"data": name, "arm": arm["arm"], facts["metric"]: f"{arm['estimate']:.1f}"})
            rows[-1]["95% interval"] = _interval(arm["interval"])
    return rows


def _interval(interval: Sequence[float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def _pictures(
    out: Path, mixture: Study, control: Study, toy: Sequence[Any], verdict: str
) -> list[tuple[Path, str, str]]:
    maze = figures.maze_figure(out / "maze.png", mixture.maze, mixture.datasets[0], mixture.evaluations)
    histogram = figures.priority_histogram(out / "priorities.png", mixture.priorities)
    curves = figures.curves(out / "curves.png", "Return while training", mixture.steps, mixture.curves)
    easy = figures.maze_figure(out / "control-maze.png", control.maze, control.datasets[0], control.evaluations)
    bars = figures.bandit_figure(out / "bandit.png", toy)
    return [
        (
            maze,
            "The data of the first seed, and where the cloned policies of all seeds go from the start (dot).",
            "Maze with paths",
        ),
        (histogram, "Weights of all seeds; the dashed line is uniform sampling.", "Histogram of the priorities"),
        (curves, "Thin: one seed; thick: mean. A few episodes per point.", "Learning curves of the arms"),
        (easy, "Control: every episode heads for the goal.", "Maze with the control's paths"),
        (out / "control" / "arms.png", f"Control: is there a benefit? {verdict}.", "Arms of the control"),
        (bars, "A check of the iteration itself, with exact values.", "Bars of mean rewards by iteration"),
    ]
