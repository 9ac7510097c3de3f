"""The demo's longer part: TD3+BC and IQL on a recorded replay buffer, with and without priorities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_oper import figures
from leap_oper.advantages import oper_a
from leap_oper.priorities import Priorities, oper_r
from leap_oper.report import Report
from leap_oper.trainer import Trainer
from leap_shared.cli import Context, Progress
from leap_shared.experiment import Experiment, Result
from leap_shared.files import ensure_folder
from leap_shared.offline import Transitions, read_d4rl

__all__ = ["Recorded", "run"]

UNIFORM, OPER_R, OPER_A = "uniform", "OPER-R", "OPER-A, decoupled"
TITLES = {"td3bc": "TD3+BC", "iql": "IQL"}
ONE_SET = "One data set, the replay buffer of one SAC run; all seeds share it, so the intervals tell of training alone."
SMALL = (
    "Networks of 128-128 and 10,000 updates instead of 256-256 and 1,000,000: a small study of the method, no row of "
    "the paper's tables."
)


@dataclass(frozen=True)
class Recorded:
    """Sizes; the defaults are what the README reports."""

    environment: str = "InvertedDoublePendulum-v5"
    recording_steps: int = 200_000
    """At most: the recording stops where the policy is medium."""
    evaluate_every: int = 500
    updates: int = 10_000
    every: int = 1000
    episodes: int = 10
    value_iterations: int = 3
    value_updates: int = 5000
    hidden: tuple[int, int] = (128, 128)


def _record(sizes: Recorded, work: Path, context: Context) -> Transitions:
    from leap_shared.offline.generation import generate_mujoco
    from leap_shared.offline.online import SACConfig

    folder = ensure_folder(work / "data")
    task: Progress[Any] = context.progress(description=f"{sizes.environment}: SAC records, steps")
    manifest = generate_mujoco(
        sizes.environment,
        "medium-replay",
        folder,
        config=SACConfig(hidden=sizes.hidden, batch_size=128),
        steps=sizes.recording_steps,
        evaluate_every=sizes.evaluate_every,
        evaluation_episodes=5,
        seed=context.seed,
        formats=("d4rl",),
        progress=lambda count, text: task.advance(count, text=text),
    )
    task.end()
    (path,) = (folder / name for name in manifest["files"] if str(name).endswith(".hdf5"))
    return read_d4rl(path)


def run(seeds: tuple[int, ...], sizes: Recorded, out: Path, context: Context) -> dict[str, Result]:
    """Record (or go on recording), train every arm and write one section for each algorithm; killed, it goes on."""
    work = ensure_folder(out / "work")
    data = _record(sizes, work, context)
    total = sizes.value_iterations * sizes.value_updates
    task: Progress[Any] = context.progress(description="OPER-A fits its values", total=total)
    fitted = oper_a(
        data,
        iters=sizes.value_iterations,
        steps=sizes.value_updates,
        device=str(context.device),
        out=work / "values",
        progress=task.advance,
    )
    arms: dict[str, Priorities | None] = {UNIFORM: None, OPER_R: oper_r(data)}
    arms[OPER_A] = fitted.at(sizes.value_iterations).ensemble("mean").rescale(std=2.0, eps=0.1)
    results = {}
    for algorithm, title in TITLES.items():
        reports = [_train(algorithm, arm, weights, data, seeds, sizes, work, context) for arm, weights in arms.items()]
        claim = Experiment(
            name=f"oper-{algorithm}",
            title=f"{title} on a replay buffer, with and without priorities",
            claim=f"{title} on batches drawn by trajectory returns (OPER-R) earns more than on uniform batches.",
            baseline=UNIFORM,
            method=OPER_R,
            metric="return",
            smallest_effect=0.05 * 9100,  # of the return at which the task counts as solved
            source="Offline Prioritized Experience Replay",
            notes=(ONE_SET, SMALL),
        )
        scores = {report.label: dict(zip(seeds, map(float, report.final), strict=True)) for report in reports}
        results[algorithm] = Result.from_outcomes(claim, scores)
        folder = ensure_folder(out / algorithm)
        pictures = [(path, caption, caption) for path, caption in figures.report_figures(folder, reports)]
        results[algorithm].write(folder, figures=pictures)
    return results


def _train(
    algorithm: str,
    arm: str,
    weights: Priorities | None,
    data: Transitions,
    seeds: tuple[int, ...],
    sizes: Recorded,
    work: Path,
    context: Context,
) -> Report:
    task: Progress[Any] = context.progress(description=f"{TITLES[algorithm]}, {arm}: updates", total=sizes.updates)
    trainer = Trainer(
        algorithm,
        data,
        priorities=weights,
        decouple=arm == OPER_A,
        seeds=seeds,
        steps=sizes.updates,
        every=sizes.every,
        environment=sizes.environment,
        episodes=sizes.episodes,
        hidden=sizes.hidden,
        label=arm,
        out=work / algorithm / arm.partition(",")[0].lower(),
        device=str(context.device),
    )
    trainer.train(progress=lambda count, text: task.advance(count, text=text))
    return trainer.report()
