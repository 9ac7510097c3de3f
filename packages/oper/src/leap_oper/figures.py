"""The pictures of the demo and of reports: mazes, priorities, learning curves, the bandit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from leap_oper.bandit import BanditIteration
from leap_oper.priorities import Priorities
from leap_oper.report import Report
from leap_shared.experiment.report import data_uri
from leap_shared.files import atomic_writer, write_text
from leap_shared.offline import Evaluation, PointMaze, Transitions, episode_returns

__all__ = [
    "COLOURS",
    "bandit_figure",
    "curves",
    "maze_figure",
    "priority_histogram",
    "report_figures",
    "write_page",
]

INK, WALL = "#22262B", "#C9CED6"
COLOURS = {"uniform BC": "#E69F00", "OPER-R": "#0072B2", "OPER-A": "#8A8F98"}


def _save(figure: Figure, path: Path) -> Path:
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", facecolor="white")
    return path


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _draw_maze(axes: Any, maze: PointMaze, title: str) -> None:
    rows, columns = maze.walls.shape
    extent = (-columns / 2, columns / 2, -rows / 2, rows / 2)
    axes.imshow(np.where(maze.walls, 1.0, np.nan), extent=extent, cmap="Greys", vmin=0, vmax=3.5, interpolation="none")
    for cell, marker, colour in ((maze.start, "o", INK), (maze.goal, "*", "#D55E00")):
        axes.plot(*maze.centre(cell), marker, color=colour, ms=15 if marker == "*" else 8, mec="white", zorder=5)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlim(extent[:2])
    axes.set_ylim(extent[2:])
    axes.set_axis_off()


def maze_figure(
    path: Path, maze: PointMaze, dataset: Transitions, evaluations: Mapping[str, Sequence[Evaluation]]
) -> Path:
    """Trajectories of one data set coloured by return, and beside them where the policies of each arm go."""
    arms = list(evaluations)
    figure = _new(3.4 * (len(arms) + 1), 3.8)
    first, *others = figure.subplots(1, len(arms) + 1)
    paths = dataset.observations[:, :2].reshape(maze.episodes, maze.episode_steps, 2)
    returns = episode_returns(dataset.rewards, dataset.ends)[:: maze.episode_steps]
    order = np.argsort(returns)
    lines = LineCollection(list(paths[order]), array=returns[order], cmap="viridis", linewidths=0.6, alpha=0.7)
    _draw_maze(first, maze, "the data, by return")
    first.add_collection(lines)
    figure.colorbar(lines, ax=first, location="bottom", shrink=0.8, label="return of the episode")
    for axes, arm in zip(others, arms, strict=True):
        success = np.concatenate([run.success for run in evaluations[arm]])
        paths = np.concatenate([run.paths for run in evaluations[arm]])
        _draw_maze(axes, maze, f"{arm}: {success.sum()} of {success.size} arrive")
        axes.add_collection(LineCollection(list(paths), colors=COLOURS[arm], linewidths=0.9, alpha=0.7))
    return _save(figure, path)


def priority_histogram(path: Path, priorities: Mapping[str, Sequence[Priorities]]) -> Path:
    """How the weights are spread, all seeds together; uniform sampling is a weight of 1."""
    figure = _new(7.0, 2.8)
    axes = figure.subplots()
    weights = {arm: np.concatenate([p.weights for p in group]) for arm, group in priorities.items()}
    top = max(w.max() for w in weights.values())
    for arm, values in weights.items():
        ess = np.mean([p.effective_sample_size / len(p) for p in priorities[arm]])
        label = f"{arm}: deviation {np.mean([p.std for p in priorities[arm]]):.2f}, effective rows {ess:.0%}"
        axes.hist(values, bins=np.linspace(0, top, 60).tolist(), color=COLOURS[arm], alpha=0.6, label=label)
    axes.axvline(1, color=INK, lw=1, ls="--")
    axes.set_yscale("log")
    axes.set_xlabel("weight (mean 1)", color=INK)
    axes.set_ylabel("rows", color=INK)
    axes.legend(frameon=False)
    _plain(axes, "Priorities of the transitions")
    return _save(figure, path)


def curves(path: Path, title: str, steps: Sequence[int], returns: Mapping[str, NDArray[np.float64]]) -> Path:
    """Mean return over the updates: one thin line per seed, a thick one for their mean; values are (steps, seeds)."""
    figure = _new(7.0, 2.8)
    axes = figure.subplots()
    for arm, values in returns.items():
        axes.plot(steps, values, color=COLOURS[arm], lw=0.7, alpha=0.5)
        axes.plot(steps, values.mean(axis=1), "o-", color=COLOURS[arm], lw=2.5, label=arm)
    axes.set_xlabel("updates", color=INK)
    axes.set_ylabel("mean return", color=INK)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=3)
    _plain(axes, title)
    return _save(figure, path)


def bandit_figure(path: Path, rows: Sequence[BanditIteration]) -> Path:
    """Mean reward under the weights of each iteration, and the published numbers."""
    figure = _new(7.0, 2.8)
    axes = figure.subplots()
    x = np.arange(len(rows))
    ours = [row.mean_reward for row in rows]
    theirs = [row.published_mean_reward for row in rows]
    axes.bar(x - 0.2, theirs, 0.36, color=WALL, label="published")
    axes.bar(x + 0.2, ours, 0.36, color=COLOURS["OPER-R"], label="here")
    for position, value in [*zip(x - 0.2, theirs, strict=True), *zip(x + 0.2, ours, strict=True)]:
        axes.text(position, value + 0.05, f"{value:.2f}", ha="center", fontsize=9, color=INK)
    axes.set_xticks(x, [f"iteration {row.iteration}" for row in rows])
    axes.set_ylabel("mean reward", color=INK)
    axes.set_ylim(0, 5.8)
    axes.legend(frameon=False, loc="upper left")
    _plain(axes, "Bandit: mean reward that each iteration would draw (uniform: 1.0)")
    return _save(figure, path)


PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8F98")  # Okabe and Ito


def report_figures(folder: Path, reports: Sequence[Report]) -> list[tuple[Path, str]]:
    """Learning curves of every task, and the weights of every run that had some: (path, caption)."""
    pictures = []
    for number, task in enumerate(dict.fromkeys(report.task for report in reports if len(report.curve))):
        figure = _new(8.0, 3.6)
        axes = figure.subplots()
        group = [report for report in reports if report.task == task and len(report.curve)]
        for colour, report in zip(itertools.cycle(PALETTE), group, strict=False):
            axes.plot(report.updates, report.curve, color=colour, lw=0.7, alpha=0.45)
            name = f"{report.algorithm}, {report.label}"
            axes.plot(report.updates, report.curve.mean(axis=1), color=colour, lw=2.4, label=name)
        axes.set_xlabel("updates", color=INK)
        axes.set_ylabel("return" if group[0].unit == "return" else "normalised score", color=INK)
        axes.legend(frameon=False)
        _plain(axes, task or "no task")
        path = _save(figure, folder / f"curves-{number}.png")
        pictures.append((path, f"{task}: thin one seed, thick the mean ({group[0].unit})."))
    weighted = [(report, weights) for report in reports for weights in report.priorities]
    if weighted:
        figure = _new(8.0, 3.2)
        axes = figure.subplots()
        for colour, (report, weights) in zip(itertools.cycle(PALETTE), weighted, strict=False):
            label = f"{report.task} {report.label}: deviation {weights['std']:.2f}, "
            label += f"effective rows {weights['effective share']:.0%}"
            axes.stairs(weights["counts"], weights["edges"], color=colour, fill=True, alpha=0.5, label=label)
        axes.axvline(1, color=INK, lw=1, ls="--")
        axes.set_yscale("log")
        axes.set_xlabel("weight (mean 1)", color=INK)
        axes.set_ylabel("rows", color=INK)
        axes.legend(frameon=False, fontsize="small")
        _plain(axes, "Priorities")
        pictures.append((_save(figure, folder / "priorities.png"), "Weights; the dashed line is uniform sampling."))
    return pictures


def write_page(path: Path, title: str, rows: Sequence[Mapping[str, str]], pictures: Sequence[tuple[Path, str]]) -> None:
    """One page without links to other files."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("leap_oper"), autoescape=True)
    embedded = [{"uri": data_uri(picture), "caption": caption} for picture, caption in pictures]
    page = environment.get_template("scores.html").render(title=title, rows=rows, figures=embedded)
    write_text(path, page)
