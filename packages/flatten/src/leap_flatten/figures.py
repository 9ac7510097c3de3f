"""The pictures of the experiment: spectra and ranks of the attention, and time over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from leap_flatten.visualize import TOLERANCE
from leap_shared.vision.pictures import INK, plain_axes, save_figure

__all__ = ["latency_figure", "rank_figure"]

COLOURS = ("#8A8F98", "#E69F00", "#009E73", "#0072B2", "#CC79A7")  # Okabe and Ito, and the baseline's and method's
LINEAR, SOFTMAX = "#0072B2", "#8A8F98"


def rank_figure(
    path: Path,
    spectra: Mapping[str, Mapping[str, Sequence[float]]],
    ranks: Mapping[str, Mapping[str, Sequence[float]]],
    head_dim: int,
) -> Path:
    """Singular values of the attention by arm, and its rank, trained and at random.

    Args:
        path: of the PNG.
        spectra: by arm and state ("trained", "random"), singular values relative to the largest.
        ranks: by arm and state, mean numerical rank of each seed.
        head_dim: the rank that linear attention cannot exceed.
    """
    figure = Figure(figsize=(10.0, 4.1), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    styles: dict[str, dict[str, Any]] = {"trained": {"lw": 2.2}, "random": {"lw": 1.4, "ls": ":"}}
    for height, (arm, colour) in enumerate(zip(spectra, COLOURS, strict=False)):
        for state, values in spectra[arm].items():
            left.plot(range(1, len(values) + 1), values, color=colour, **styles[state])
            filled = {"mfc": colour if state == "trained" else "white", "mec": colour}
            offset = 0.14 if state == "trained" else -0.14
            places = [height + offset] * len(ranks[arm][state])
            right.plot(ranks[arm][state], places, "o", ms=7, alpha=0.8, **filled)
    tokens = len(values)
    left.set_yscale("log")
    left.set_ylim(1e-6, 2)  # what is below is rounding of float32
    left.set_xlim(1, tokens)
    left.set_xticks([1, head_dim, *range(16, tokens + 1, 16)])
    left.set_xlabel("singular value, by size", color=INK)
    left.set_ylabel("relative to the largest", color=INK)
    left.axhline(TOLERANCE, color=INK, lw=1, ls="--")
    left.text(tokens, TOLERANCE * 1.3, "counted above", ha="right", color=INK, fontsize=9)
    lines = [Line2D([], [], color=colour, lw=2.2, label=arm) for arm, colour in zip(spectra, COLOURS, strict=False)]
    lines += [Line2D([], [], color=INK, label=state, **style) for state, style in styles.items()]
    figure.legend(handles=lines, frameon=False, fontsize=9, loc="outside lower center", ncols=len(lines))
    plain_axes(left, "Spectrum of the equivalent attention matrix")
    right.axvline(head_dim, color=INK, lw=1, ls="--")
    right.text(head_dim + 1, len(spectra) - 0.55, f"dim of a head: {head_dim}", color=INK, fontsize=9)
    right.set_xlim(0, tokens + 2)
    right.set_ylim(-0.5, len(spectra) - 0.3)
    right.set_yticks(range(len(spectra)), list(spectra))
    right.set_xlabel(f"numerical rank of {tokens}", color=INK)
    plain_axes(right, "Rank, one dot per seed (hollow: random)")
    save_figure(figure, path)
    return path


def latency_figure(
    path: Path, tokens: Sequence[int], times: Mapping[str, Sequence[float]], slopes: Mapping[str, float]
) -> Path:
    """Time over tokens, both logarithmic, one line per layer; `times` are in milliseconds, `slopes` exponents."""
    figure = Figure(figsize=(7.0, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(times.items(), (LINEAR, SOFTMAX), strict=False):
        axes.plot(tokens, values, "o-", color=colour, lw=2.2, label=f"{name}: grows as N^{slopes[name]:.2f}")
    ends = np.array([tokens[-1] / 16, tokens[-1]])
    for power, values in enumerate(times.values(), start=1):
        guide = 1.6 * values[-1] * (ends / ends[1]) ** power
        axes.plot(ends, guide, ":", color=INK, lw=1)
        axes.text(ends[1] * 1.06, guide[1], "N" if power == 1 else "N²", color=INK)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.minorticks_off()
    shown: NDArray[np.int64] = np.array([count for count in tokens if np.log2(count) % 2 == 0])
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    axes.set_xlabel("tokens N", color=INK)
    axes.set_ylabel("milliseconds of one thread", color=INK)
    axes.legend(frameon=False)
    plain_axes(axes, "One image through the layer, on a CPU")
    save_figure(figure, path)
    return path
