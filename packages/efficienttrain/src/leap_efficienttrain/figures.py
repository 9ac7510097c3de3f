"""The picture of the experiment: accuracy over seconds, differences between arms, and time beside operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from leap_efficienttrain.arms import ARMS, MATCHED, METRIC, SECONDS
from leap_shared.vision.pictures import INK, plain_axes, save_figure

__all__ = ["figure"]

ORDINARY, OURS, PARTS = "#E69F00", "#0072B2", "#8A8F98"  # Okabe and Ito: safe for every colour vision
LINES = {"ordinary": ("third", "two thirds", "full"), "ET++": ("et third", "et two thirds")}
SHARES = {"third": "T/3", "two thirds": "2T/3", "full": "T"}
MARKS = {MATCHED: "s", "sizes third": "<", "magnitudes third": "^"}


def figure(path: Path, tasks: Sequence[Mapping[str, Any]]) -> Path:
    """Draw what `demo.run` found, a row for each kind of pictures.

    Args:
        path: of the PNG.
        tasks: as in its result.
    """
    drawn = Figure(figsize=(15.5, 0.8 + 4.2 * len(tasks)), dpi=130, layout="constrained")
    rows = drawn.subplots(len(tasks), 3, squeeze=False, width_ratios=(1.35, 1.1, 0.8))
    for (left, middle, right), task in zip(rows, tasks, strict=True):
        _accuracies(left, task)
        _differences(middle, task["comparisons"])
        _costs(right, task["costs"])
    save_figure(drawn, path)
    return path


def _accuracies(axes: Any, task: Mapping[str, Any]) -> None:
    arms = {row["arm"]: row for row in task["arms"]}
    for label, names in LINES.items():
        points = [arms[ARMS[name].title] for name in names]
        across, up = ([row[key]["estimate"] for row in points] for key in (SECONDS, METRIC))
        axes.plot(across, up, "o-", color=_colour(names[0]), lw=1.2, ms=8, mec="white", label=label)
        for name, *place in zip(names, across, up, strict=True):
            text = SHARES[name.removeprefix("et ")]
            axes.annotate(text, place, (6, -12), textcoords="offset points", color=_colour(name), fontsize=9)
    for name, arm in ARMS.items():
        seconds, accuracy = (arms[arm.title][key] for key in (SECONDS, METRIC))
        colour, mark = _colour(name), MARKS.get(name, "o")
        axes.plot(seconds["values"], accuracy["values"], mark, color=colour, ms=4, alpha=0.3, mew=0)
        for facts, other, line in ((accuracy, seconds, axes.vlines), (seconds, accuracy, axes.hlines)):
            if facts["interval"] is not None:
                line(other["estimate"], *facts["interval"], color=colour, lw=1.6)
        if name in MARKS:
            middle = (seconds["estimate"], accuracy["estimate"])
            axes.plot(*middle, mark, color=colour, ms=8, mec="white", label=arm.title)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training, measured", color=INK)
    axes.set_ylabel(f"{METRIC} (%)", color=INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    plain_axes(axes, task["task"])


def _colour(arm: str) -> str:
    chosen = ARMS[arm]
    return OURS if chosen.sizes and chosen.magnitudes else PARTS if chosen.sizes or chosen.magnitudes else ORDINARY


def _differences(axes: Any, comparisons: Sequence[Mapping[str, Any]]) -> None:
    shown = [facts for facts in comparisons if facts["rule"] != "faster"]
    for row, facts in enumerate(shown):
        colour = OURS if facts["claim"] else PARTS
        spread = np.linspace(-0.1, 0.1, len(facts["values"])) if len(facts["values"]) > 1 else np.zeros(1)
        axes.plot(facts["values"], row + 0.2 + spread, "o", color=colour, ms=4, alpha=0.4, mew=0)
        if facts["interval"] is not None:
            axes.plot(facts["interval"], [row - 0.15] * 2, color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(facts["estimate"], row - 0.15, "D", color=colour, ms=6)
    axes.axvline(0, color=INK, lw=1)
    labels = [f"{facts['comparison'].replace(' - ', chr(10) + '- ')}\n{facts['verdict']}" for facts in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.set_ylim(len(shown) - 0.45, -0.6)
    axes.set_xlabel("difference in test accuracy (points)", color=INK)
    saved = next(facts for facts in comparisons if facts["rule"] == "faster")
    plain_axes(axes, f"ET++ 2T/3 takes {100 - saved['estimate']:.0f}% of T's seconds")


def _costs(axes: Any, costs: Sequence[Mapping[str, Any]]) -> None:
    places = np.arange(len(costs))
    for shift, key, label, colour in ((-0.2, "operations", "operations", PARTS), (0.2, "time", "measured time", OURS)):
        bars = axes.bar(places + shift, [row[key] for row in costs], 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8, color=INK)
    axes.set_xticks(places, [f"{row['size']} px" for row in costs])
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    plain_axes(axes, "One picture, in parts of full size")
