"""The pictures of the experiment: differences between arms, and memory and time over the size of the neighbourhood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from leap_shared.experiment import Estimate
from leap_shared.vision.pictures import INK, plain_axes, save_figure

__all__ = ["costs_figure", "differences_figure"]

CLAIMED, OTHER = "#0072B2", "#8A8F98"
COLOURS = ("#E69F00", "#CC79A7", "#8A8F98", "#0072B2")  # Okabe and Ito; ours comes last
MARKS, WIDTHS = ("s", "D", "^", "o"), (3.6, 1.6, 1.6, 2.4)  # the first two are one line where they agree


def differences_figure(
    path: Path, differences: Mapping[str, tuple[Sequence[float], Estimate]], smallest_effect: float, unit: str
) -> Path:
    """Differences between arms, one row each, the claim's first.

    Args:
        path: of the PNG.
        differences: by name, those of the seeds and their mean with its interval.
        smallest_effect: the least one that would matter.
        unit: of the differences.
    """
    figure = Figure(figsize=(8.4, 1.2 + 0.62 * len(differences)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for row, (values, estimate) in enumerate(differences.values()):
        colour = OTHER if row else CLAIMED
        spread = np.linspace(-0.11, 0.11, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, row + 0.16 + np.array(spread), "o", color=colour, ms=5, alpha=0.45, mew=0)
        if np.isfinite(estimate.low):
            axes.plot([estimate.low, estimate.high], [row - 0.16] * 2, color=colour, lw=2.4, solid_capstyle="butt")
        axes.plot(estimate.value, row - 0.16, "D", color=colour, ms=7)
    axes.axvline(0, color=INK, lw=1)
    axes.axvline(smallest_effect, color=INK, lw=1, ls="--")
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.45, -0.6)
    axes.set_xlabel(f"difference in test accuracy ({unit})", color=INK)
    plain_axes(axes, "Differences between arms, seed by seed")
    save_figure(figure, path)
    return path


def costs_figure(
    path: Path,
    kernel_sizes: Sequence[int],
    memory: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[float]],
) -> Path:
    """Extra memory and time of the attention over k * k, one line per implementation, ours last.

    Args:
        path: of the PNG.
        kernel_sizes: k.
        memory: in feature maps.
        times: in milliseconds.
    """
    figure = Figure(figsize=(10.0, 4.0), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    slots = [k * k for k in kernel_sizes]
    for axes, by_name in ((left, memory), (right, times)):
        for (name, values), colour, mark, width in zip(by_name.items(), COLOURS, MARKS, WIDTHS, strict=True):
            axes.plot(slots, values, color=colour, marker=mark, ms=5 + width / 2, lw=width, label=name)
        axes.set_xticks(slots, [f"{k}x{k}" for k in kernel_sizes])
        axes.set_xlabel("neighbourhood k x k", color=INK)
        axes.set_ylim(bottom=0)
    ours = list(memory.values())[-1]
    for count, value in zip(slots, ours, strict=True):
        left.annotate(
            f"{value:.1f}", (count, value), (0, 7), textcoords="offset points", ha="center", color=COLOURS[-1]
        )
    left.set_ylabel("feature maps", color=INK)
    right.set_ylabel("milliseconds of one thread", color=INK)
    plain_axes(left, "Memory besides q, k, v and the output")
    plain_axes(right, "Time of a call")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=9, loc="outside lower center", ncols=len(names))
    save_figure(figure, path)
    return path
